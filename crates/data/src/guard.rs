//! Calls into crates that panic at some files: `tokenizers` at an empty string to prepend before a letter of two bytes, `parquet` at parts
//! that contradict each other. An error here, because the file is a user's.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// What a call returns, or what it said when it panicked. Nothing of that is printed: the standard library has a hook of the whole process for
/// it and no other way, so this one passes every other panic on.
pub(crate) fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
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
        format!("the library that reads it fails there: {}", said.unwrap_or("it does not say why"))
    })
}
