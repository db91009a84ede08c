//! The error codes of cuFile: names and meanings as in `cufile.h` of its release 1.20.

use crate::error::{Error, ErrorKind};

/// `CU_FILE_CUDA_DRIVER_ERROR`: the CUDA code beside it says more.
pub(super) const CUDA_DRIVER_ERROR: i32 = 5011;
/// `CU_FILE_DRIVER_ALREADY_OPEN`.
pub(super) const DRIVER_ALREADY_OPEN: i32 = 5026;

/// Code, name, what the header says of it.
const CODES: [(i32, &str, &str); 48] = [
    (5001, "CU_FILE_DRIVER_NOT_INITIALIZED", "nvidia-fs is not loaded, and compatibility mode is off"),
    (5002, "CU_FILE_DRIVER_INVALID_PROPS", "invalid property"),
    (5003, "CU_FILE_DRIVER_UNSUPPORTED_LIMIT", "property out of range"),
    (5004, "CU_FILE_DRIVER_VERSION_MISMATCH", "nvidia-fs has another version than the library wants"),
    (5005, "CU_FILE_DRIVER_VERSION_READ_ERROR", "the version of nvidia-fs cannot be read"),
    (5006, "CU_FILE_DRIVER_CLOSING", "the driver is shutting down"),
    (5007, "CU_FILE_PLATFORM_NOT_SUPPORTED", "GPUDirect Storage is not supported on this platform"),
    (5008, "CU_FILE_IO_NOT_SUPPORTED", "GPUDirect Storage is not supported on this file"),
    (5009, "CU_FILE_DEVICE_NOT_SUPPORTED", "GPUDirect Storage is not supported on this GPU"),
    (5010, "CU_FILE_NVFS_DRIVER_ERROR", "an ioctl of nvidia-fs failed"),
    (CUDA_DRIVER_ERROR, "CU_FILE_CUDA_DRIVER_ERROR", "a call of the CUDA driver failed"),
    (5012, "CU_FILE_CUDA_POINTER_INVALID", "invalid device pointer"),
    (5013, "CU_FILE_CUDA_MEMORY_TYPE_INVALID", "wrong type of memory"),
    (5014, "CU_FILE_CUDA_POINTER_RANGE_ERROR", "the range exceeds the allocation"),
    (5015, "CU_FILE_CUDA_CONTEXT_MISMATCH", "another CUDA context is current"),
    (5016, "CU_FILE_INVALID_MAPPING_SIZE", "access beyond the largest pinned size"),
    (5017, "CU_FILE_INVALID_MAPPING_RANGE", "access beyond the mapped size"),
    (5018, "CU_FILE_INVALID_FILE_TYPE", "unsupported type of file"),
    (5019, "CU_FILE_INVALID_FILE_OPEN_FLAG", "unsupported open flags"),
    (5020, "CU_FILE_DIO_NOT_SET", "the descriptor has no O_DIRECT"),
    (5022, "CU_FILE_INVALID_VALUE", "invalid argument"),
    (5023, "CU_FILE_MEMORY_ALREADY_REGISTERED", "the memory is registered already"),
    (5024, "CU_FILE_MEMORY_NOT_REGISTERED", "the memory is not registered"),
    (5025, "CU_FILE_PERMISSION_DENIED", "no access to the driver or the file"),
    (DRIVER_ALREADY_OPEN, "CU_FILE_DRIVER_ALREADY_OPEN", "the driver is open already"),
    (5027, "CU_FILE_HANDLE_NOT_REGISTERED", "the file is not registered"),
    (5028, "CU_FILE_HANDLE_ALREADY_REGISTERED", "the file is registered already"),
    (5029, "CU_FILE_DEVICE_NOT_FOUND", "no such GPU"),
    (5030, "CU_FILE_INTERNAL_ERROR", "internal error"),
    (5031, "CU_FILE_GETNEWFD_FAILED", "no new file descriptor"),
    (5033, "CU_FILE_NVFS_SETUP_ERROR", "the driver cannot be initialised"),
    (5034, "CU_FILE_IO_DISABLED", "cufile.json disables GPUDirect Storage on this file"),
    (5035, "CU_FILE_BATCH_SUBMIT_FAILED", "a batch was not submitted"),
    (5036, "CU_FILE_GPU_MEMORY_PINNING_FAILED", "GPU memory cannot be pinned"),
    (5037, "CU_FILE_BATCH_FULL", "the batch queue is full"),
    (5038, "CU_FILE_ASYNC_NOT_SUPPORTED", "stream operations are not supported"),
    (5039, "CU_FILE_INTERNAL_BATCH_SETUP_ERROR", "internal error of a batch"),
    (5040, "CU_FILE_INTERNAL_BATCH_SUBMIT_ERROR", "internal error of a batch"),
    (5041, "CU_FILE_INTERNAL_BATCH_GETSTATUS_ERROR", "internal error of a batch"),
    (5042, "CU_FILE_INTERNAL_BATCH_CANCEL_ERROR", "internal error of a batch"),
    (5043, "CU_FILE_NOMEM_ERROR", "out of memory"),
    (5044, "CU_FILE_IO_ERROR", "I/O error"),
    (5045, "CU_FILE_INTERNAL_BUF_REGISTER_ERROR", "internal error while memory was registered"),
    (5046, "CU_FILE_HASH_OPR_ERROR", "internal error of a table"),
    (5047, "CU_FILE_INVALID_CONTEXT_ERROR", "invalid CUDA context"),
    (5048, "CU_FILE_NVFS_INTERNAL_DRIVER_ERROR", "internal error of nvidia-fs"),
    (5049, "CU_FILE_BATCH_NOCOMPAT_ERROR", "a batch needs compatibility mode, which is off"),
    (5050, "CU_FILE_IO_MAX_ERROR", "error"),
];

/// The name of a code and what it means: `CU_FILE_IO_NOT_SUPPORTED (5008): ...`.
pub fn describe(code: i32) -> String {
    match CODES.iter().find(|(known, _, _)| *known == code) {
        Some((_, name, text)) => format!("{name} ({code}): {text}"),
        None => format!("cuFile error {code}"),
    }
}

/// The error of a call that gave this code, and the CUDA code beside it (0: none).
pub(crate) fn error(tried: &str, code: i32, cuda: i32) -> Error {
    let kind = match code {
        5001 | 5004 | 5005 | 5007..=5009 | 5018..=5020 | 5033 | 5034 | 5038 | 5049 => ErrorKind::Unsupported,
        5025 => ErrorKind::PermissionDenied,
        5016 | 5036 | 5043 => ErrorKind::OutOfDeviceMemory,
        5022 => ErrorKind::Invalid,
        5044 => ErrorKind::Io,
        _ => ErrorKind::Device,
    };
    let beside = if cuda == 0 { String::new() } else { format!(", CUDA error {cuda}") };
    Error::new(kind, format!("{tried}: {}{beside}", describe(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_their_names_and_unknown_ones_their_number() {
        assert!(describe(5008).starts_with("CU_FILE_IO_NOT_SUPPORTED (5008)"));
        assert_eq!(describe(4711), "cuFile error 4711");
        let error = error("read m", CUDA_DRIVER_ERROR, 700);
        assert!(error.to_string().contains("CUDA error 700"), "{error}");
        assert!(CODES.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
