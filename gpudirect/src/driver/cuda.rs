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
mod vmm;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUresult};
use nvme::Arena;

use super::mapped::Mapping;
use super::{Batch, DeviceCopy, DeviceInfo, Direction, Driver, Refused, Stream, VirtualMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::paged::Move;
use kernel::Kernels;

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
/// Batches of fewer copies are made one by one: the driver's batch call pays off from a few on.
const BATCH_MIN: usize = 4;

/// `cuMemcpyBatchAsync` as CUDA 12.8 has it; later drivers keep that symbol.
type CopyBatch = unsafe extern "C" fn(
    *mut sys::CUdeviceptr,
    *mut sys::CUdeviceptr,
    *mut usize,
    usize,
    *mut sys::CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> CUresult;

/// Arenas that are pinned, by address: how often, and by which context, which must not go before they are unpinned. All
/// contexts of the process know them.
static PINNED: Mutex<BTreeMap<usize, (usize, Arc<Context>)>> = Mutex::new(BTreeMap::new());

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
    for name in NEEDED {
        // SAFETY: the symbol is only looked up here, never called as this type.
        if unsafe { library.get::<unsafe extern "C" fn()>(name.to_bytes_with_nul()) }.is_err() {
            let context = format!(
                "load the CUDA driver: its library lacks {}; CUDA 11.4 or newer is needed",
                name.to_string_lossy()
            );
            return Err(Error::new(ErrorKind::OldDriver, context));
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
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` is valid for writes; it is destroyed below.
        check(unsafe { sys::cuStreamCreate(&mut stream, flags) }, || "make a stream".into())?;
        let mut failed = None;
        let mut took = Duration::ZERO;
        // The first time warms up.
        for times in [1, times] {
            let started = Instant::now();
            for _ in 0..times {
                // SAFETY: both ranges were found to be memory of this device and not to overlap; the caller keeps it.
                let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, size(len), stream) };
                failed = failed.or(check(result, || format!("copy {len} bytes on the device")).err());
            }
            // SAFETY: the stream is alive.
            let result = unsafe { sys::cuStreamSynchronize(stream) };
            failed = failed.or(check(result, || "wait for copies on the device".into()).err());
            took = started.elapsed();
        }
        // SAFETY: made above, destroyed once.
        unsafe { sys::cuStreamDestroy_v2(stream) };
        failed.map_or(Ok(took), Err)
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
            driver: format!("{}.{}", version / 1000, version % 1000 / 10),
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
        self.0.enter()?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` is valid for writes; it is destroyed in Drop.
        check(unsafe { sys::cuStreamCreate(&mut stream, flags) }, || "make a copy stream".into())?;
        let copy_batch = self.0.copy_batch;
        Ok(Box::new(CudaStream {
            cuda: self.0.clone(),
            stream,
            copy_batch,
            running: VecDeque::new(),
            events: Vec::new(),
        }))
    }

    fn enter(&self) -> Result<()> {
        self.0.enter()
    }

    fn copy_within(&self, moves: &[DeviceCopy]) -> Result<()> {
        self.0.enter()?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` is valid for writes; it is destroyed by `Once`.
        check(unsafe { sys::cuStreamCreate(&mut stream, flags) }, || "make a copy stream".into())?;
        Once(stream).copy(moves)
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

/// A stream of its own for a few copies, waited for when it goes.
struct Once(sys::CUstream);

impl Once {
    fn copy(&self, moves: &[DeviceCopy]) -> Result<()> {
        for one in moves {
            // SAFETY: the driver refuses addresses that are not allocated; the stream is alive.
            let result = unsafe { sys::cuMemcpyDtoDAsync_v2(one.to, one.from, one.len as usize, self.0) };
            check(result, || format!("copy {} bytes on the device to {:#x}", one.len, one.to))?;
        }
        // SAFETY: the stream is alive.
        check(unsafe { sys::cuStreamSynchronize(self.0) }, || "wait for copies on the device".into())
    }
}

impl Drop for Once {
    fn drop(&mut self) {
        // SAFETY: made in `copy_within`, destroyed once; what it still runs ends by itself, in memory of the device.
        unsafe { sys::cuStreamDestroy_v2(self.0) };
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

struct CudaStream {
    cuda: Arc<Context>,
    stream: sys::CUstream,
    copy_batch: Option<CopyBatch>,
    /// Batches in order, each with the event after its last copy; moves have no batch.
    running: VecDeque<(Option<Batch>, sys::CUevent)>,
    /// Events to use again.
    events: Vec<sys::CUevent>,
}

// SAFETY: stream and event handles may be used from any thread; `&mut self` keeps uses apart.
unsafe impl Send for CudaStream {}

impl CudaStream {
    fn event(&mut self) -> Result<sys::CUevent> {
        if let Some(event) = self.events.pop() {
            return Ok(event);
        }
        let mut event = std::ptr::null_mut();
        // Waiting sleeps instead of burning a core, and no time stamps are taken.
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32
            | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: `event` is valid for writes; it is destroyed in Drop.
        check(unsafe { sys::cuEventCreate(&mut event, flags) }, || "make an event".into())?;
        Ok(event)
    }

    /// Puts the batch's copies into the stream, and an event behind them.
    fn issue(&mut self, batch: &mut Batch, event: sys::CUevent) -> Result<()> {
        let direction = batch.direction;
        let owned = batch.buffers.iter_mut().map(|buffer| buffer.as_mut_ptr() as u64);
        let hosts: Vec<u64> = owned.chain(batch.lent.iter().map(super::Lent::address)).collect();
        let host = |part: &super::Part| hosts[part.buffer as usize] + part.offset as u64;
        let batched = match self.copy_batch {
            Some(function) if batch.parts.len() >= BATCH_MIN => self.issue_batch(function, batch, &host)?,
            _ => false,
        };
        if !batched {
            for part in &batch.parts {
                let result = match direction {
                    // SAFETY: `check` found the part inside its buffer or what was lent, which the stream keeps until the event
                    // behind this copy has happened; the driver refuses device addresses that are not allocated.
                    Direction::ToDevice => unsafe {
                        sys::cuMemcpyHtoDAsync_v2(part.device, host(part) as *const _, part.len, self.stream)
                    },
                    // SAFETY: as above; the batch owns the buffer, so nobody else reads or writes it meanwhile.
                    Direction::ToHost => unsafe {
                        sys::cuMemcpyDtoHAsync_v2(host(part) as *mut _, part.device, part.len, self.stream)
                    },
                };
                check(result, || format!("copy {} bytes, device address {:#x}", part.len, part.device))?;
            }
        }
        // SAFETY: both handles are ours and alive.
        check(unsafe { sys::cuEventRecord(event, self.stream) }, || "record an event".into())
    }

    /// All copies by one call. False: this driver will not have it so, nothing was started, they are to go one by one.
    fn issue_batch(
        &mut self,
        function: CopyBatch,
        batch: &Batch,
        host: &dyn Fn(&super::Part) -> u64,
    ) -> Result<bool> {
        let mut hosts: Vec<u64> = batch.parts.iter().map(host).collect();
        let mut devices: Vec<u64> = batch.parts.iter().map(|part| part.device).collect();
        let mut sizes: Vec<usize> = batch.parts.iter().map(|part| part.len).collect();
        let on_host = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_HOST, id: 0 };
        let on_device = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: self.cuda.ordinal as c_int,
        };
        let (to, from, src, dst) = match batch.direction {
            Direction::ToDevice => (&mut devices, &mut hosts, on_host, on_device),
            Direction::ToHost => (&mut hosts, &mut devices, on_device, on_host),
        };
        let mut attributes = sys::CUmemcpyAttributes {
            srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: src,
            dstLocHint: dst,
            flags: 0,
        };
        let (mut first, mut failed) = (0usize, 0usize);
        // SAFETY: the three arrays have `sizes.len()` elements each, and the one attribute is for all copies from index 0 on.
        // Addresses as in `issue`: host ranges are inside buffers that the stream keeps until its event.
        let result = unsafe {
            function(
                to.as_mut_ptr(),
                from.as_mut_ptr(),
                sizes.as_mut_ptr(),
                sizes.len(),
                &mut attributes,
                &mut first,
                1,
                &mut failed,
                self.stream,
            )
        };
        match result {
            CUresult::CUDA_SUCCESS => Ok(true),
            CUresult::CUDA_ERROR_INVALID_VALUE | CUresult::CUDA_ERROR_NOT_SUPPORTED => {
                tracing::debug!("cuMemcpyBatchAsync: {}; copies go one by one", explain(result));
                self.copy_batch = None;
                Ok(false)
            }
            _ => check(result, || format!("copy {} ranges", sizes.len())).map(|()| true),
        }
    }

    /// Waits for all that was started. False when the driver cannot say that it ended.
    fn drained(&self) -> bool {
        // SAFETY: the stream is alive.
        self.cuda.enter().is_ok()
            && unsafe { sys::cuStreamSynchronize(self.stream) } == CUresult::CUDA_SUCCESS
    }
}

impl Stream for CudaStream {
    fn copy(&mut self, mut batch: Batch) -> std::result::Result<(), Refused> {
        let prepared = batch.check().and_then(|()| self.cuda.enter()).and_then(|()| self.event());
        let event = match prepared {
            Ok(event) => event,
            Err(error) => return Err(Refused { batch, error }),
        };
        if let Err(error) = self.issue(&mut batch, event) {
            self.events.push(event);
            // Some of its copies may run.
            if !self.drained() {
                std::mem::forget(std::mem::take(&mut batch.buffers));
                std::mem::forget(std::mem::take(&mut batch.lent));
            }
            return Err(Refused { batch, error });
        }
        self.running.push_back((Some(batch), event));
        Ok(())
    }

    fn reap(&mut self, wait: bool, each: &mut dyn FnMut(Batch)) -> Result<usize> {
        self.cuda.enter()?;
        let mut count = 0;
        while let Some(&(_, event)) = self.running.front() {
            let result = match wait && count == 0 {
                // SAFETY: the event was recorded and is alive.
                true => unsafe { sys::cuEventSynchronize(event) },
                // SAFETY: as above.
                false => unsafe { sys::cuEventQuery(event) },
            };
            match result {
                CUresult::CUDA_ERROR_NOT_READY => break,
                result => check(result, || "wait for copies".into())?,
            }
            if let Some((batch, event)) = self.running.pop_front() {
                self.events.push(event);
                count += 1;
                batch.into_iter().for_each(&mut *each);
            }
        }
        Ok(count)
    }

    fn in_flight(&self) -> usize {
        self.running.len()
    }

    fn shuffle(&mut self, job: &Arc<Move>) -> Result<()> {
        self.cuda.enter()?;
        let kernels = self.cuda.kernels()?;
        let event = self.event()?;
        let started = kernels.start(job, self.stream).and_then(|()| {
            // SAFETY: both handles are ours and alive.
            check(unsafe { sys::cuEventRecord(event, self.stream) }, || "record an event".into())
        });
        match started {
            Ok(()) => self.running.push_back((None, event)),
            Err(_) => self.events.push(event),
        }
        started
    }

    fn finish(&mut self, each: &mut dyn FnMut(Batch)) -> Result<()> {
        while !self.running.is_empty() {
            self.reap(true, each)?;
        }
        Ok(())
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        if !self.drained() {
            if !self.running.is_empty() {
                tracing::error!(
                    "{} batches of copies did not end well: their memory stays theirs",
                    self.running.len()
                );
            }
            std::mem::forget(std::mem::take(&mut self.running));
            return;
        }
        for event in self.events.drain(..).chain(self.running.drain(..).map(|(_, event)| event)) {
            // SAFETY: made by `event`, destroyed once; the stream is idle.
            unsafe { sys::cuEventDestroy_v2(event) };
        }
        // SAFETY: made by `stream`, destroyed once, idle.
        unsafe { sys::cuStreamDestroy_v2(self.stream) };
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
