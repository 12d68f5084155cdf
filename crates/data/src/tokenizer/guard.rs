//! Calls into the `tokenizers` crate. It panics at some parts of a file and some texts, such as an empty string to prepend before a letter of
//! two bytes: an error here, because the file is a user's.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// What a call returns, or what it said when it panicked. Nothing of that is printed: the standard library has a hook of the whole process for
/// it and no other way, so this one passes every other panic on.
pub(super) fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = take_hook();
        set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                others(panic);
            }
        }));
    });
    let outside = GUARDED.replace(true);
    let returned = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(outside);
    returned.map_err(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        format!("the tokenizers crate fails there: {}", said.unwrap_or("it does not say why"))
    })
}
