//! Messages on a socket: a kind, a length, bytes.

use std::io::{Error, ErrorKind, Read, Result, Write};

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A [`super::hello::Hello`].
    Hello,
    /// All are there.
    Welcome,
    /// Why not, in words.
    Refused,
    /// A part of an agreement, or all parts.
    Agree,
    /// The end of a process that ended well.
    Bye,
    /// Why a process ends, in words.
    Failed,
}

const KINDS: [Kind; 6] = [Kind::Hello, Kind::Welcome, Kind::Refused, Kind::Agree, Kind::Bye, Kind::Failed];
/// Begins every message: another program that happens to connect says something else.
const MAGIC: [u8; 4] = *b"DASH";
/// Bytes of a message at most. Records of a validation take some MB.
const MOST: usize = 1 << 30;

/// Writes a message.
///
/// # Errors
/// When the other side is gone.
pub fn write(to: &mut impl Write, kind: Kind, bytes: &[u8]) -> Result<()> {
    if bytes.len() > MOST {
        return Err(Error::new(ErrorKind::InvalidInput, format!("a message of {} bytes", bytes.len())));
    }
    let at = KINDS.iter().position(|k| *k == kind).expect("it is one of them") as u8;
    let mut message = MAGIC.to_vec();
    message.push(at);
    message.extend((bytes.len() as u32).to_le_bytes());
    message.extend(bytes);
    to.write_all(&message)
}

/// Reads a message of at most `most` bytes.
///
/// # Errors
/// When the other side is gone or says something else.
pub fn read(from: &mut impl Read, most: usize) -> Result<(Kind, Vec<u8>)> {
    let mut head = [0; 9];
    from.read_exact(&mut head)?;
    let length = u32::from_le_bytes([head[5], head[6], head[7], head[8]]) as usize;
    let kind = KINDS.get(head[4] as usize).filter(|_| head[..4] == MAGIC && length <= most.min(MOST));
    let kind = *kind.ok_or_else(|| Error::new(ErrorKind::InvalidData, "this is no message of DashLab"))?;
    // grows with what comes, not with what is announced
    let mut bytes = Vec::new();
    from.take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() < length {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok((kind, bytes))
}

/// Some byte strings as one.
pub fn pack(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(parts.iter().map(|p| p.len() + 4).sum());
    for part in parts {
        out.extend((part.len() as u32).to_le_bytes());
        out.extend(part);
    }
    out
}

/// The byte strings of [`pack`]; none where they are cut.
pub fn unpack(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut parts = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (part, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        parts.push(part.to_vec());
        bytes = rest;
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_as_they_went_and_others_are_refused() {
        let mut wire = Vec::new();
        write(&mut wire, Kind::Agree, b"abc").unwrap();
        write(&mut wire, Kind::Bye, b"").unwrap();
        let mut at = &wire[..];
        assert_eq!(read(&mut at, 3).unwrap(), (Kind::Agree, b"abc".to_vec()));
        assert_eq!(read(&mut at, 3).unwrap(), (Kind::Bye, Vec::new()));
        assert_eq!(read(&mut at, 3).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(read(&mut &wire[..], 2).unwrap_err().kind(), ErrorKind::InvalidData, "longer than allowed");
        assert_eq!(read(&mut &wire[..11], 3).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(read(&mut &b"GET / HTTP/1.1\r\n"[..], 3).unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn parts_are_packed() {
        let parts = [b"a".to_vec(), Vec::new(), b"bcd".to_vec()];
        let bytes = pack(&parts);
        assert_eq!(unpack(&bytes).unwrap(), parts);
        assert_eq!(unpack(&bytes[..bytes.len() - 1]), None);
        assert_eq!(unpack(&[]).unwrap(), Vec::<Vec<u8>>::new());
    }
}
