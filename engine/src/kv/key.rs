//! Keys: hashes of prefixes.

use std::fmt;

use crate::error::{Error, ErrorKind, Result};

/// The key of a block: a hash, of 16 to 32 bytes, of everything that its content follows from up to its last token.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    bytes: [u8; 32],
    len: u8,
}

impl Key {
    /// From 16 to 32 bytes.
    pub fn new(bytes: &[u8]) -> Result<Key> {
        if !(16..=32).contains(&bytes.len()) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("a key of {} bytes: hashes of 16 to 32 bytes are taken", bytes.len()),
            ));
        }
        let mut padded = [0; 32];
        padded[..bytes.len()].copy_from_slice(bytes);
        Ok(Key { bytes: padded, len: bytes.len() as u8 })
    }

    /// From hexadecimal digits.
    pub fn from_hex(text: &str) -> Result<Key> {
        let bad = || {
            Error::new(
                ErrorKind::InvalidArgument,
                format!("{text:?} is no key: 32 to 64 hexadecimal digits are"),
            )
        };
        if !text.is_ascii() || !text.len().is_multiple_of(2) {
            return Err(bad());
        }
        let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| bad());
        let bytes: Vec<u8> = (0..text.len()).step_by(2).map(byte).collect::<Result<_>>()?;
        Key::new(&bytes).map_err(|_| bad())
    }

    pub(crate) fn from_padded(bytes: [u8; 32], len: u8) -> Option<Key> {
        let fits = (16..=32).contains(&len) && bytes[usize::from(len)..].iter().all(|byte| *byte == 0);
        fits.then_some(Key { bytes, len })
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Bytes of an encoded key.
    pub(crate) const ENCODED: usize = 33;

    /// Puts keys one after the other, as they go over the control socket.
    pub(crate) fn encode(keys: &[Key]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(keys.len() * Key::ENCODED);
        for key in keys {
            bytes.push(key.len);
            bytes.extend_from_slice(&key.bytes);
        }
        bytes
    }

    /// Takes them apart again; `None`: these are no keys.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Vec<Key>> {
        if !bytes.len().is_multiple_of(Key::ENCODED) {
            return None;
        }
        let key = |one: &[u8]| {
            let (len, rest) = one.split_first()?;
            Key::from_padded(rest.try_into().ok()?, *len)
        };
        bytes.chunks_exact(Key::ENCODED).map(key).collect()
    }

    pub(crate) fn padded(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// Bytes, 16 to 32.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}
