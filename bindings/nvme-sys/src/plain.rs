//! Structures as bytes and back. The only unsafe code of this crate, and the rule that makes it sound.

#![allow(unsafe_code)]

use crate::generated::*;

mod sealed {
    pub trait Sealed {}
}

/// A structure made of integers (and arrays and unions of integers) only, without padding: every pattern of bytes is a
/// value of it, and every value of it is initialized bytes. Implemented here, for generated structures, and nowhere else.
pub trait Plain: sealed::Sealed + Copy {}

macro_rules! plain {
    ($($name:ident = $size:literal),* $(,)?) => {$(
        impl sealed::Sealed for $name {}
        impl Plain for $name {}
        // The specification's size: nothing was added behind the fields.
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

// SAFETY of the functions below rests on this list. Each name is a `repr(C)` structure of `generated.rs` whose fields are
// u8 to u64, arrays of them, or other structures of this list; the headers spell every reserved byte out as a field, and
// bindgen is told to do so where they do not (explicit_padding).
plain! {
    nvme_id_ctrl = 4096,
    nvme_id_psd = 32,
    nvme_id_ns = 4096,
    nvme_lbaf = 4,
    nvme_nvm_id_ns = 4096,
    nvme_id_ctrl_nvm = 4096,
    nvme_id_independent_id_ns = 4096,
    nvme_ns_list = 4096,
    nvme_ctrl_list = 4096,
    nvme_smart_log = 512,
    nvme_error_log_page = 64,
    nvme_firmware_slot = 512,
    nvme_st_result = 28,
    nvme_self_test_log = 564,
    nvme_passthru_cmd = 72,
    nvme_passthru_cmd64 = 80,
    nvme_uring_cmd = 72,
}

/// A structure with every byte zero: what a command or a reply starts as.
pub const fn zeroed<T: Plain>() -> T {
    // SAFETY: T is Plain (see the list above), so all-zero bytes are a value of it.
    unsafe { core::mem::zeroed() }
}

/// The structure at the start of `bytes`, copied, whatever their alignment. None when they are too few.
pub fn from_bytes<T: Plain>(bytes: &[u8]) -> Option<T> {
    let bytes = bytes.get(..size_of::<T>())?;
    // SAFETY: `bytes` holds size_of::<T>() initialized bytes, and T is Plain, so they are a value of it;
    // read_unaligned needs no alignment.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Its bytes.
pub fn as_bytes<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `value` is valid for size_of::<T>() bytes, all initialized, since a Plain type has no padding.
    unsafe { core::slice::from_raw_parts((&raw const *value).cast::<u8>(), size_of::<T>()) }
}

/// Its bytes, to be overwritten: a Plain type has no value that is not allowed.
pub fn as_bytes_mut<T: Plain>(value: &mut T) -> &mut [u8] {
    // SAFETY: as in `as_bytes`; the borrow is exclusive, and any bytes written are a value of T.
    unsafe { core::slice::from_raw_parts_mut((&raw mut *value).cast::<u8>(), size_of::<T>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_in_and_out_unchanged_and_too_few_are_refused() {
        let mut page = [0u8; 4097];
        for (i, byte) in page.iter_mut().enumerate() {
            *byte = i as u8;
        }
        // Odd address: no alignment is asked for.
        let id: nvme_id_ctrl = from_bytes(&page[1..]).unwrap();
        assert_eq!(as_bytes(&id), &page[1..4097]);
        assert_eq!(u16::from_le(id.vid), 0x0201);
        assert!(from_bytes::<nvme_id_ctrl>(&page[..4095]).is_none());
        let mut command: nvme_passthru_cmd = zeroed();
        assert!(as_bytes(&command).iter().all(|&b| b == 0));
        as_bytes_mut(&mut command)[0] = 0x06;
        assert_eq!(command.opcode, nvme_admin_identify as u8);
    }
}
