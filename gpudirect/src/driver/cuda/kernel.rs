//! The kernels of [`Move`] and [`Halves`], compiled by the driver from PTX.

#![allow(unsafe_code)]

use std::ffi::{CString, c_void};
use std::sync::{Arc, PoisonError};

use cudarc::driver::sys::{self, CUresult};

use super::{Context, check, explain};
use crate::error::{Error, ErrorKind, Result};
use crate::halves::{self, Halves, Way};
use crate::paged::Move;
use crate::paged::kernel::{self, Launch, THREADS, WIDTHS};

/// Bytes for what the compiler says.
const LOG: usize = 4096;

/// Threads of a group that joins or splits.
const HALVES_THREADS: u32 = 256;

pub(super) struct Kernels {
    module: sys::CUmodule,
    /// In the order of [`WIDTHS`].
    entries: [sys::CUfunction; WIDTHS.len()],
    join: sys::CUfunction,
    split: sys::CUfunction,
}

// SAFETY: handles of a module that is unloaded with the context only; any thread with that current may launch its entries.
unsafe impl Send for Kernels {}
// SAFETY: see Send; nothing in it is changed after it was made.
unsafe impl Sync for Kernels {}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kernels")
    }
}

impl Context {
    /// The kernels, compiled now where they were not. The context must be current.
    pub(super) fn kernels(&self) -> Result<Arc<Kernels>> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = &*kernels {
            return Ok(kernels.clone());
        }
        let loaded = Arc::new(Kernels::load()?);
        *kernels = Some(loaded.clone());
        Ok(loaded)
    }
}

impl Kernels {
    /// Compiles the module in the current context.
    fn load() -> Result<Kernels> {
        let invalid = |error: std::ffi::NulError| Error::new(ErrorKind::Invalid, error.to_string());
        let text = CString::new(kernel::ptx() + &halves::ptx()).map_err(invalid)?;
        let mut log = vec![0u8; LOG];
        let mut options = [
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        ];
        // The size is passed by value, in the place of a pointer.
        let mut values = [log.as_mut_ptr().cast::<c_void>(), LOG as *mut c_void];
        let mut module = std::ptr::null_mut();
        // SAFETY: the text is NUL-terminated; both arrays have as many elements as is said, and the log has LOG bytes. All
        // live until the call returns, and the driver keeps none of them.
        let result = unsafe {
            sys::cuModuleLoadDataEx(
                &mut module,
                text.as_ptr().cast(),
                options.len() as u32,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        if result != CUresult::CUDA_SUCCESS {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(LOG);
            let said = String::from_utf8_lossy(&log[..end]);
            let context = format!("compile the kernels: {} {}", explain(result), said.trim());
            return Err(Error::new(ErrorKind::Device, context));
        }
        let find = |name: &str| -> Result<sys::CUfunction> {
            let text = CString::new(name).map_err(invalid)?;
            let mut function = std::ptr::null_mut();
            // SAFETY: `function` is valid for writes, the module was loaded, the name is NUL-terminated.
            let result = unsafe { sys::cuModuleGetFunction(&mut function, module, text.as_ptr()) };
            check(result, || format!("find the kernel {name}"))?;
            Ok(function)
        };
        let mut entries = [std::ptr::null_mut(); WIDTHS.len()];
        for (entry, width) in entries.iter_mut().zip(WIDTHS) {
            *entry = find(&kernel::entry(width))?;
        }
        let (join, split) = (find(halves::entry(Way::Join))?, find(halves::entry(Way::Split))?);
        Ok(Kernels { module, entries, join, split })
    }

    /// Unloads the module. Its context is current, and no launch of it runs.
    pub(super) fn unload(&self) {
        // SAFETY: loaded by `load`; the context's drop calls this once, when streams are gone, which wait for their launches.
        unsafe { sys::cuModuleUnload(self.module) };
    }

    /// Puts a move into a stream of the current context.
    pub(super) fn start(&self, job: &Move, stream: sys::CUstream) -> Result<()> {
        let width = job.width();
        let index = WIDTHS.iter().position(|other| *other == width).unwrap_or(WIDTHS.len() - 1);
        let function = self.entries[index];
        job.launches(&mut |mut launch: Launch| {
            let mut parameters = [launch.args.as_mut_ptr().cast::<c_void>()];
            // SAFETY: the entry takes one parameter of ARGS bytes, which `args` points to; the driver copies it before it returns.
            // What the kernel reads and writes was found to lie in memory of the device when the move was made, and the trait
            // asks the caller to keep that until the move ended.
            let result = unsafe {
                sys::cuLaunchKernel(
                    function,
                    launch.grid.0,
                    launch.grid.1,
                    1,
                    THREADS,
                    1,
                    1,
                    0,
                    stream,
                    parameters.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            check(result, || format!("move {} bytes between paged layout and staging", job.bytes()))
        })
    }

    /// Puts a join or a split into a stream of the current context, whose handle is taken on the caller's word.
    pub(super) fn halves(&self, job: &Halves, stream: u64) -> Result<()> {
        let function = match job.way {
            Way::Join => self.join,
            Way::Split => self.split,
        };
        let groups = job.threads().div_ceil(HALVES_THREADS.into()) as u32;
        let mut values = [job.master, job.hi, job.lo, job.ties, job.count];
        let mut parameters = values.each_mut().map(|value| (&raw mut *value).cast::<c_void>());
        // SAFETY: the entry takes five parameters of 8 bytes, which `parameters` points to; the driver copies them before it returns. The caller found
        // the ranges to be memory of the device, and keeps them until the stream has gone on; a handle that is no stream is refused.
        let result = unsafe {
            sys::cuLaunchKernel(
                function,
                groups,
                1,
                1,
                HALVES_THREADS,
                1,
                1,
                0,
                stream as sys::CUstream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check(result, || format!("take {} weights apart or together", job.count))
    }
}
