//! The real driver, by cudarc, which loads libcuda at run time.
//!
//! The unsafe code of this crate that calls CUDA is here and in the files of `cuda/`. cudarc panics when a library or a symbol
//! is missing, so both are looked for before anything is called: what is not there is an error of ours.
//!
//! **Who owns what.** A batch's buffers are kept in the stream's list from the first copy of the batch until the event
//! after its last copy was seen to have happened. Should the driver fail in between, the memory is leaked: a copy engine may
//! still use it. The driver's own context is the device's primary one, so what frameworks of the same process have on the
//! device is in the same address space.

#![allow(unsafe_code)]

mod kernel;
mod stream;
mod vmm;

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUresult};
use nvme::Arena;

use super::mapped::Mapping;
use super::{DeviceCopy, DeviceInfo, Driver, Stream, VirtualMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::halves::Halves;
use kernel::Kernels;
use stream::{CopyBatch, CudaStream, Once};

/// Every symbol that is called here, but for those that are optional.
const NEEDED: [&CStr; 40] = [
    c"cuInit",
    c"cuDriverGetVersion",
    c"cuDeviceGetCount",
    c"cuDeviceGet",
    c"cuDeviceGetName",
    c"cuDeviceGetPCIBusId",
    c"cuDevicePrimaryCtxRetain",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuCtxSetCurrent",
    c"cuMemGetInfo_v2",
    c"cuMemHostRegister_v2",
    c"cuMemHostUnregister",
    c"cuMemAlloc_v2",
    c"cuMemFree_v2",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemcpyDtoDAsync_v2",
    c"cuStreamCreate",
    c"cuStreamDestroy_v2",
    c"cuStreamSynchronize",
    c"cuEventCreate",
    c"cuEventRecord",
    c"cuEventQuery",
    c"cuEventSynchronize",
    c"cuEventDestroy_v2",
    c"cuGetErrorString",
    c"cuDeviceGetAttribute",
    c"cuPointerGetAttribute",
    c"cuModuleLoadDataEx",
    c"cuModuleGetFunction",
    c"cuModuleUnload",
    c"cuLaunchKernel",
    c"cuMemAddressReserve",
    c"cuMemAddressFree",
    c"cuMemCreate",
    c"cuMemRelease",
    c"cuMemMap",
    c"cuMemUnmap",
    c"cuMemSetAccess",
    c"cuMemGetAllocationGranularity",
];

/// `CU_MEMHOSTREGISTER_PORTABLE` of cuda.h: pinned for every context of the process.
const PORTABLE: u32 = 1;
/// `CU_MEMHOSTREGISTER_READ_ONLY`: pages that this process may not write to, such as those of a file.
const READ_ONLY: u32 = 8;
/// Arenas that are pinned, by address: how often, and by which context, which must not go before they are unpinned. All
/// contexts of the process know them.
static PINNED: Mutex<BTreeMap<usize, (usize, Arc<Context>)>> = Mutex::new(BTreeMap::new());

/// The oldest driver that is used, by the CUDA that it is of: 1000 a major version, 10 a minor one.
const LEAST: c_int = 11040;

fn version_text(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// What the driver says of a result. Called only once [`NEEDED`] is known to be there.
fn explain(result: CUresult) -> String {
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: cuGetErrorString writes a pointer to a static string, or null, to `text`, which is valid for writes.
    let known =
        unsafe { sys::cuGetErrorString(result, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    if !known {
        return format!("CUDA error {}", result as u32);
    }
    // SAFETY: on success the driver gave a NUL-terminated string that lives as long as the library, which is never unloaded.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    format!("{text} (CUDA error {})", result as u32)
}

fn check(result: CUresult, tried: impl FnOnce() -> String) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let kind = match result {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => ErrorKind::OutOfDeviceMemory,
        CUresult::CUDA_ERROR_NO_DEVICE => ErrorKind::NoDevice,
        _ => ErrorKind::Device,
    };
    Err(Error::new(kind, format!("{}: {}", tried(), explain(result))))
}

/// Loads libcuda and starts it.
fn start() -> Result<()> {
    // SAFETY: loads the library to see whether it is there; its initialisers are those of NVIDIA's driver.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::new(
            ErrorKind::NoDriver,
            "load the CUDA driver: libcuda.so.1 was not found; it comes with NVIDIA's driver (in a container: \
             --gpus all)",
        ));
    }
    // SAFETY: the library is there, so this does not panic.
    let library = unsafe { sys::culib() };
    let mut found: c_int = 0;
    // SAFETY: the type is that of cuda.h for this symbol, which every driver has.
    let version =
        unsafe { library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDriverGetVersion\0") };
    if let Ok(version) = version {
        // SAFETY: `found` is valid for writes; the function needs no cuInit.
        unsafe { version(&mut found) };
    }
    let old = |lacks: &str| {
        let context = format!(
            "load the CUDA driver: it is of CUDA {}{lacks}; of CUDA {} or newer is needed: install a newer NVIDIA driver (R470 is of \
             CUDA 11.4)",
            version_text(found),
            version_text(LEAST)
        );
        Err(Error::new(ErrorKind::OldDriver, context))
    };
    if found < LEAST {
        return old("");
    }
    for name in NEEDED {
        // SAFETY: the symbol is only looked up here, never called as this type.
        if unsafe { library.get::<unsafe extern "C" fn()>(name.to_bytes_with_nul()) }.is_err() {
            return old(&format!(" by its own word, and lacks {}", name.to_string_lossy()));
        }
    }
    // SAFETY: no arguments but flags, which must be 0.
    check(unsafe { sys::cuInit(0) }, || "start the CUDA driver".into())
}

/// How many devices there are.
pub fn count() -> Result<u32> {
    start()?;
    let mut count: c_int = 0;
    // SAFETY: `count` is valid for writes.
    check(unsafe { sys::cuDeviceGetCount(&mut count) }, || "count the CUDA devices".into())?;
    Ok(count.max(0) as u32)
}

/// The number of the device that memory at an address is of. Waits for what a stream of its context was given so far, `stream` being a
/// `CUstream` of the same process (1 and 2: the default ones, as cuda.h and `__cuda_array_interface__` number them).
pub fn device_of(address: u64, stream: Option<u64>) -> Result<u32> {
    start()?;
    let ordinal: c_int =
        pointer_attribute(sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address).map_err(
            |error| {
                let context = format!("find out which CUDA device has memory at {address:#x}: there is none");
                Error::new(ErrorKind::Invalid, context).with_source(error)
            },
        )?;
    let ordinal = ordinal.max(0) as u32;
    if let Some(stream) = stream {
        CudaDriver::open(ordinal)?.0.enter()?;
        // SAFETY: the caller's word is that this is a stream of this process; the driver refuses handles that it does not know.
        let result = unsafe { sys::cuStreamSynchronize(stream as sys::CUstream) };
        check(result, || format!("wait for a stream of cuda:{ordinal}"))?;
    }
    Ok(ordinal)
}

/// One CUDA device, by its primary context.
#[derive(Debug)]
pub struct CudaDriver(Arc<Context>);

#[derive(Debug)]
struct Context {
    ordinal: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    copy_batch: Option<CopyBatch>,
    /// Compiled by the driver when they are first needed.
    kernels: Mutex<Option<Arc<Kernels>>>,
    /// CUDA does not survive fork(2).
    pid: u32,
}

// SAFETY: a CUcontext is a handle that any thread may make current; the driver locks inside.
unsafe impl Send for Context {}
// SAFETY: see Send; nothing in it is changed after it was made.
unsafe impl Sync for Context {}

impl CudaDriver {
    /// Opens the device of this number.
    pub fn open(ordinal: u32) -> Result<CudaDriver> {
        let count = count()?;
        if ordinal >= count {
            let context = format!("open cuda:{ordinal}: there are {count} CUDA devices here, counted from 0");
            return Err(Error::new(ErrorKind::NoDevice, context));
        }
        let tried = || format!("open cuda:{ordinal}");
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: `device` is valid for writes, the ordinal is below the count.
        check(unsafe { sys::cuDeviceGet(&mut device, ordinal as c_int) }, tried)?;
        // SAFETY: `context` is valid for writes; it is released in Drop.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) }, tried)?;
        // SAFETY: the library is loaded; the type is that of cuda.h for this symbol.
        let copy_batch =
            unsafe { sys::culib().get::<CopyBatch>(b"cuMemcpyBatchAsync\0") }.ok().map(|symbol| *symbol);
        let pid = std::process::id();
        Ok(CudaDriver(Arc::new(Context {
            ordinal,
            device,
            context,
            copy_batch,
            kernels: Mutex::new(None),
            pid,
        })))
    }
}

impl Context {
    /// Makes the context current for this thread.
    fn enter(&self) -> Result<()> {
        if std::process::id() != self.pid {
            let context = format!(
                "use cuda:{} in a process that was forked after CUDA was started, which CUDA does not allow: start workers \
                 by spawn instead of fork, or open the device in them",
                self.ordinal
            );
            return Err(Error::new(ErrorKind::Device, context));
        }
        // SAFETY: the context is retained until Drop.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, || {
            format!("enter the context of cuda:{}", self.ordinal)
        })
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<c_int> {
        let mut value: c_int = 0;
        // SAFETY: `value` is valid for writes; the device was given by the driver.
        let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) };
        check(result, || format!("ask what cuda:{} can do", self.ordinal))?;
        Ok(value)
    }
}

/// One attribute of an address. `T` is the type that cuda.h names for it.
fn pointer_attribute<T: Default>(attribute: sys::CUpointer_attribute, address: u64) -> Result<T> {
    let mut value = T::default();
    // SAFETY: `value` is valid for writes and of the attribute's own type; any address may be asked about.
    let result = unsafe { sys::cuPointerGetAttribute((&raw mut value).cast::<c_void>(), attribute, address) };
    check(result, || format!("look at device address {address:#x}"))?;
    Ok(value)
}

impl Drop for Context {
    fn drop(&mut self) {
        if std::process::id() == self.pid {
            let kernels = self.kernels.get_mut().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(kernels) = kernels
                && self.enter().is_ok()
            {
                kernels.unload();
            }
            // SAFETY: retained once in `open`, released once here; streams and their events hold an Arc of this.
            unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}

impl CudaDriver {
    /// Copies `len` bytes on the device `times` times, and says how long that took: a ceiling to compare with. Both ranges must
    /// be memory of this device.
    pub fn time_device_copy(&self, from: u64, to: u64, len: u64, times: u32) -> Result<Duration> {
        self.check_range(from, len)?;
        self.check_range(to, len)?;
        if from.abs_diff(to) < len {
            return Err(Error::new(ErrorKind::Invalid, "copy a range to itself"));
        }
        let stream = Once::new()?;
        let copies = |times: u32| vec![DeviceCopy { from, to, len }; times as usize];
        stream.copy(&copies(1))?; // warms up
        let started = Instant::now();
        stream.copy(&copies(times))?;
        Ok(started.elapsed())
    }
}

fn size(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

impl Driver for CudaDriver {
    fn info(&self) -> Result<DeviceInfo> {
        let cuda = &*self.0;
        cuda.enter()?;
        let tried = || format!("ask about cuda:{}", cuda.ordinal);
        let text = |buffer: &[u8]| {
            CStr::from_bytes_until_nul(buffer)
                .map(|text| text.to_string_lossy().into_owned())
                .unwrap_or_default()
        };
        let mut name = [0u8; 128];
        check(
            // SAFETY: the buffer is valid for writes of the length passed.
            unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, cuda.device) },
            tried,
        )?;
        let mut pci = [0u8; 32];
        check(
            // SAFETY: the buffer is valid for writes of the length passed.
            unsafe { sys::cuDeviceGetPCIBusId(pci.as_mut_ptr().cast(), pci.len() as c_int, cuda.device) },
            tried,
        )?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are valid for writes; a context is current.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, tried)?;
        let mut version: c_int = 0;
        // SAFETY: `version` is valid for writes.
        check(unsafe { sys::cuDriverGetVersion(&mut version) }, tried)?;
        Ok(DeviceInfo {
            id: format!("cuda:{}", cuda.ordinal),
            name: text(&name),
            pci: text(&pci).to_lowercase(),
            memory_bytes: total as u64,
            free_bytes: free as u64,
            driver: version_text(version),
        })
    }

    fn pin(&self, arena: &Arena) -> Result<()> {
        self.0.enter()?;
        let mut pinned = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((count, _)) = pinned.get_mut(&(arena.as_ptr() as usize)) {
            *count += 1;
            return Ok(());
        }
        // SAFETY: the arena's mapping is valid for its length; the caller's lane keeps it until `unpin`. Registering changes
        // no contents.
        let result = unsafe { sys::cuMemHostRegister_v2(arena.as_ptr().cast(), arena.len(), PORTABLE) };
        check(result, || {
            format!("pin {} bytes of host memory for cuda:{}{}", arena.len(), self.0.ordinal, memlock_hint())
        })
        .map_err(|error| match error.kind() {
            ErrorKind::OutOfDeviceMemory => {
                Error::new(ErrorKind::OutOfHostMemory, error.to_string()).with_source(error)
            }
            _ => error,
        })?;
        pinned.insert(arena.as_ptr() as usize, (1, self.0.clone()));
        Ok(())
    }

    fn unpin(&self, arena: &Arena) -> Result<()> {
        let address = arena.as_ptr() as usize;
        let mut pinned = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
        let context = match pinned.get_mut(&address) {
            Some((count, _)) if *count > 1 => {
                *count -= 1;
                return Ok(());
            }
            Some((_, context)) => context.clone(),
            None => return Err(Error::new(ErrorKind::Invalid, "unpin an arena that is not pinned")),
        };
        context.enter()?;
        pinned.remove(&address);
        // SAFETY: registered by `pin` with this context; nobody else pinned it, and no copy uses it, as the trait asks.
        let result = unsafe { sys::cuMemHostUnregister(arena.as_ptr().cast()) };
        check(result, || format!("unpin {} bytes of host memory", arena.len()))
    }

    fn alloc(&self, len: u64) -> Result<u64> {
        self.0.enter()?;
        let mut address = 0;
        // SAFETY: `address` is valid for writes; a context is current.
        let result = unsafe { sys::cuMemAlloc_v2(&mut address, size(len)) };
        check(result, || {
            let free = self.info().map_or(0, |info| info.free_bytes);
            format!("allocate {len} bytes on cuda:{}, which has {free} free", self.0.ordinal)
        })?;
        Ok(address)
    }

    fn free(&self, address: u64) -> Result<()> {
        self.0.enter()?;
        // SAFETY: the driver refuses addresses that it did not give out. It waits for copies that use the memory.
        check(unsafe { sys::cuMemFree_v2(address) }, || format!("free device memory at {address:#x}"))
    }

    fn stream(&self) -> Result<Box<dyn Stream>> {
        Ok(Box::new(CudaStream::new(&self.0)?))
    }

    fn enter(&self) -> Result<()> {
        self.0.enter()
    }

    fn copy_within(&self, moves: &[DeviceCopy]) -> Result<()> {
        self.0.enter()?;
        Once::new()?.copy(moves)
    }

    fn halves(&self, job: &Halves, stream: u64) -> Result<()> {
        job.check()?;
        job.ranges().into_iter().try_for_each(|(address, len)| self.check_range(address, len))?;
        self.0.enter()?;
        self.0.kernels()?.halves(job, stream)
    }

    fn check_range(&self, address: u64, len: u64) -> Result<()> {
        use sys::CUpointer_attribute as Attribute;
        self.0.enter()?;
        let no_memory = |at: u64| {
            let context = format!(
                "{len} bytes at {address:#x}: there is no memory of cuda:{} at {at:#x}",
                self.0.ordinal
            );
            Error::new(ErrorKind::Invalid, context)
        };
        let end = address.checked_add(len).ok_or_else(|| no_memory(address))?;
        let mut at = address;
        while at < end {
            let failed = |error: Error| no_memory(at).with_source(error);
            let kind: u32 =
                pointer_attribute(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, at).map_err(failed)?;
            let ordinal: c_int =
                pointer_attribute(Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, at).map_err(failed)?;
            if kind != sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32 || ordinal != self.0.device {
                return Err(no_memory(at));
            }
            let start: u64 =
                pointer_attribute(Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, at).map_err(failed)?;
            let size: usize =
                pointer_attribute(Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE, at).map_err(failed)?;
            // A tensor may lie in several allocations that are neighbours, as those of virtual memory are.
            let next = start.saturating_add(size as u64);
            if next <= at {
                return Err(no_memory(at));
            }
            at = next;
        }
        Ok(())
    }

    fn pin_mapped(&self, mapping: &Mapping, offset: u64, len: usize) -> Result<()> {
        mapping.check(offset, len)?;
        self.0.enter()?;
        let supported = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED;
        if self.0.attribute(supported)? == 0 {
            let context = format!("cuda:{} cannot pin memory that is only read", self.0.ordinal);
            return Err(Error::new(ErrorKind::Unsupported, context));
        }
        let address = (mapping.address() + offset) as *mut c_void;
        // SAFETY: the range is whole pages of the mapping (checked), which the piece that is made of this keeps until it was
        // unpinned. The pages are only read, by the device.
        let result = unsafe { sys::cuMemHostRegister_v2(address, len, PORTABLE | READ_ONLY) };
        check(result, || format!("pin {len} bytes of a file for cuda:{}{}", self.0.ordinal, memlock_hint()))
    }

    fn unpin_mapped(&self, mapping: &Mapping, offset: u64, len: usize) -> Result<()> {
        self.0.enter()?;
        let address = (mapping.address() + offset) as *mut c_void;
        // SAFETY: registered by `pin_mapped`; no copy uses it, as the trait asks.
        check(unsafe { sys::cuMemHostUnregister(address) }, || format!("unpin {len} bytes of a file"))
    }

    fn virtual_memory(&self) -> Option<&dyn VirtualMemory> {
        let supported = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED;
        match self.0.attribute(supported) {
            Ok(value) if value != 0 => Some(self),
            _ => None,
        }
    }
}

/// RLIMIT_MEMLOCK, where there is a limit: drivers differ in whether they heed it.
fn memlock_hint() -> String {
    match rustix::process::getrlimit(rustix::process::Resource::Memlock).current {
        Some(limit) => {
            format!(
                " (RLIMIT_MEMLOCK is {limit} bytes: ulimit -l unlimited, LimitMEMLOCK=infinity, docker --ulimit memlock=-1)"
            )
        }
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_cuda_gets_an_error_that_names_the_library() {
        match CudaDriver::open(0) {
            Ok(driver) => {
                println!("skipped: this machine has CUDA: {:?}", driver.info().map(|info| info.name))
            }
            Err(error) => {
                assert!(matches!(
                    error.kind(),
                    ErrorKind::NoDriver | ErrorKind::NoDevice | ErrorKind::Device
                ));
                if error.kind() == ErrorKind::NoDriver {
                    assert!(error.to_string().contains("libcuda.so.1"), "{error}");
                }
            }
        }
    }
}
