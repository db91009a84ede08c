//! Memory that other libraries see: DLPack out and in, and host memory of others as a device to save from.
//!
//! All unsafe code of this crate is here. Two rules carry it: what is exported keeps its load's memory by an `Arc` until the
//! consumer's deleter call, and what is imported is only read while the Python object that owns it is held by the caller.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::{CStr, c_void};
use std::sync::Arc;

use engine::tensors::Dtype;
use gpudirect::driver::{DeviceCopy, Refused};
use gpudirect::paged::Move;
use gpudirect::{Batch, DeviceInfo, Direction, Driver, Error, ErrorKind, Stream};
use nvme::Arena;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::process::Mine;

/// Memory of a load, given back when its last tensor and the last view of it are gone.
#[derive(Debug)]
pub struct Hold {
    memory: Option<Mine<Arc<gpudirect::DeviceMemory>>>,
    cuda: bool,
}

impl Hold {
    /// Takes a share of a load's memory, on the device of that name.
    pub fn new(memory: Arc<gpudirect::DeviceMemory>, device: &str) -> Hold {
        Hold { memory: Some(Mine::new(memory)), cuda: device.starts_with("cuda") }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        if self.cuda && memory.is_here() {
            aside(move || drop(memory));
        }
    }
}

/// Runs on a thread of its own what makes CUDA's context current: who drops a tensor of `cuda:1` goes on with the device that it
/// had.
pub fn aside(run: impl FnOnce() + Send + 'static) {
    // Without threads the process has other worries than its current device; the closure is dropped, and its memory with it.
    if let Ok(thread) = std::thread::Builder::new().name("nvtier-free".into()).spawn(run) {
        let _ = thread.join();
    }
}

/// `DLDevice` of dlpack.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct DlDevice {
    kind: i32,
    id: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy)]
struct DlType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    ndim: i32,
    dtype: DlType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLManagedTensor`: before DLPack 1.0.
#[repr(C)]
struct Managed {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// `DLManagedTensorVersioned`: from DLPack 1.0 on.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    flags: u64,
    tensor: DlTensor,
}

/// `kDLCPU` and `kDLCUDA`.
pub const CPU: i32 = 1;
/// See [`CPU`].
pub const CUDA: i32 = 2;

/// The DLPack version that is written: the first one with 8-bit floats.
const VERSION: (u32, u32) = (1, 1);
/// `DLPACK_FLAG_BITMASK_READ_ONLY`.
const READ_ONLY: u64 = 1;
const PLAIN: &CStr = c"dltensor";
const WITH_VERSION: &CStr = c"dltensor_versioned";

/// Code and bits of a type in DLPack; `None` for types that are handed out as rows of bytes.
pub fn dl_type(dtype: Dtype) -> Option<(u8, u8)> {
    Some(match dtype {
        Dtype::I8 => (0, 8),
        Dtype::I16 => (0, 16),
        Dtype::I32 => (0, 32),
        Dtype::I64 => (0, 64),
        Dtype::U8 => (1, 8),
        Dtype::U16 => (1, 16),
        Dtype::U32 => (1, 32),
        Dtype::U64 => (1, 64),
        Dtype::F16 => (2, 16),
        Dtype::F32 => (2, 32),
        Dtype::F64 => (2, 64),
        Dtype::BF16 => (4, 16),
        Dtype::C64 => (5, 64),
        Dtype::C128 => (5, 128),
        Dtype::Bool => (6, 8),
        Dtype::F8E4M3 => (10, 8),
        Dtype::F8E4M3Fnuz => (11, 8),
        Dtype::F8E5M2 => (12, 8),
        Dtype::F8E5M2Fnuz => (13, 8),
        Dtype::F8E8M0 => (14, 8),
        _ => return None,
    })
}

/// What a capsule's pointer points to, with what it points to in turn. `head` stands first: both have one address.
#[repr(C)]
struct Exported<T> {
    head: T,
    shape: Vec<i64>,
    strides: Vec<i64>,
    hold: Arc<Hold>,
}

/// A tensor to export.
pub struct Export {
    /// Address on the device.
    pub address: u64,
    /// `kDLCPU` or `kDLCUDA`, and its number.
    pub device: (i32, i32),
    /// Code and bits.
    pub dtype: (u8, u8),
    /// Lengths in C order.
    pub shape: Vec<i64>,
    /// Keeps the memory.
    pub hold: Arc<Hold>,
}

impl Export {
    fn tensor(&self) -> (DlTensor, Vec<i64>, Vec<i64>) {
        let mut shape = self.shape.clone();
        let mut strides = vec![1i64; shape.len()];
        for dim in (1..shape.len()).rev() {
            strides[dim - 1] = strides[dim].saturating_mul(shape[dim].max(1));
        }
        let tensor = DlTensor {
            data: self.address as *mut c_void,
            device: DlDevice { kind: self.device.0, id: self.device.1 },
            ndim: shape.len() as i32,
            dtype: DlType { code: self.dtype.0, bits: self.dtype.1, lanes: 1 },
            shape: shape.as_mut_ptr(),
            strides: strides.as_mut_ptr(),
            byte_offset: 0,
        };
        (tensor, shape, strides)
    }

    /// A capsule as `__dlpack__` gives it.
    pub fn capsule(self, py: Python<'_>, versioned: bool) -> PyResult<Bound<'_, PyAny>> {
        let (tensor, shape, strides) = self.tensor();
        let hold = self.hold;
        let (pointer, name, destructor): (*mut c_void, &CStr, ffi::PyCapsule_Destructor) = if versioned {
            let head = Versioned {
                major: VERSION.0,
                minor: VERSION.1,
                context: std::ptr::null_mut(),
                deleter: Some(delete::<Versioned>),
                flags: 0,
                tensor,
            };
            let exported = Box::new(Exported { head, shape, strides, hold });
            (Box::into_raw(exported).cast(), WITH_VERSION, destroy_versioned)
        } else {
            let head = Managed { tensor, context: std::ptr::null_mut(), deleter: Some(delete::<Managed>) };
            let exported = Box::new(Exported { head, shape, strides, hold });
            (Box::into_raw(exported).cast(), PLAIN, destroy_plain)
        };
        // SAFETY: the interpreter is attached (`py`); `pointer` is not null; the name is static; the destructor fits it.
        let capsule = unsafe { ffi::PyCapsule_New(pointer, name.as_ptr(), Some(destructor)) };
        if capsule.is_null() {
            // SAFETY: `pointer` is the box that was made above, and no capsule took it.
            unsafe {
                if versioned {
                    delete::<Versioned>(pointer.cast());
                } else {
                    delete::<Managed>(pointer.cast());
                }
            }
        }
        // SAFETY: a new reference, or null with an exception set.
        unsafe { Bound::from_owned_ptr_or_err(py, capsule) }
    }
}

/// The deleter that consumers call once, from any thread, with or without the interpreter.
unsafe extern "C" fn delete<T>(head: *mut T) {
    if !head.is_null() {
        // SAFETY: `head` is the first field of a boxed `Exported<T>` (repr(C)) that `capsule` leaked; DLPack's contract is
        // that its one owner calls this once.
        drop(unsafe { Box::from_raw(head.cast::<Exported<T>>()) });
    }
}

unsafe extern "C" fn destroy_plain(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter calls this with a valid capsule. A consumer renames what it took; only what still has our name
    // is ours, and its pointer is the boxed `Exported`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, PLAIN.as_ptr()) == 1 {
            delete::<Managed>(ffi::PyCapsule_GetPointer(capsule, PLAIN.as_ptr()).cast());
        }
    }
}

unsafe extern "C" fn destroy_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: as in `destroy_plain`.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, WITH_VERSION.as_ptr()) == 1 {
            delete::<Versioned>(ffi::PyCapsule_GetPointer(capsule, WITH_VERSION.as_ptr()).cast());
        }
    }
}

/// What a capsule of somebody else says.
pub struct Imported {
    /// Address on its device.
    pub address: u64,
    /// `kDLCPU` or `kDLCUDA`, and its number.
    pub device: (i32, i32),
    /// Code and bits.
    pub dtype: (u8, u8),
    /// Lengths in C order.
    pub shape: Vec<u64>,
    /// Whether its elements lie one after the other.
    pub contiguous: bool,
    /// Whether its owner lets others write to it; before DLPack 1.0 nobody says.
    pub writable: bool,
}

/// Looks into a capsule that `__dlpack__` gave. The memory is its owner's: it is there for as long as the capsule is, which
/// stays unconsumed.
pub fn import(capsule: &Bound<'_, PyAny>) -> PyResult<Imported> {
    let object = capsule.as_ptr();
    // SAFETY: `object` is a live object; PyCapsule_IsValid takes any, and is 1 only for a capsule of that name, whose pointer is
    // then a DLManagedTensor (or the versioned one) by the DLPack protocol, valid while the capsule lives and is unconsumed.
    let (tensor, flags): (&DlTensor, u64) = unsafe {
        if ffi::PyCapsule_IsValid(object, PLAIN.as_ptr()) == 1 {
            (&(*ffi::PyCapsule_GetPointer(object, PLAIN.as_ptr()).cast::<Managed>()).tensor, 0)
        } else if ffi::PyCapsule_IsValid(object, WITH_VERSION.as_ptr()) == 1 {
            let head = ffi::PyCapsule_GetPointer(object, WITH_VERSION.as_ptr()).cast::<Versioned>();
            if (*head).major != VERSION.0 {
                let text = format!("a DLPack tensor of version {}, not {}", (*head).major, VERSION.0);
                return Err(pyo3::exceptions::PyBufferError::new_err(text));
            }
            (&(*head).tensor, (*head).flags)
        } else {
            let text = "no DLPack capsule, or one that was consumed already";
            return Err(pyo3::exceptions::PyBufferError::new_err(text));
        }
    };
    let ndim = usize::try_from(tensor.ndim).unwrap_or(0);
    let read = |pointer: *const i64| -> Vec<i64> {
        if pointer.is_null() || ndim == 0 {
            return Vec::new();
        }
        // SAFETY: by the protocol shape and strides have `ndim` elements, valid as long as the tensor is.
        unsafe { std::slice::from_raw_parts(pointer, ndim) }.to_vec()
    };
    let (shape, strides) = (read(tensor.shape), read(tensor.strides));
    let mut expected = 1i64;
    let mut contiguous = true;
    if !strides.is_empty() && !shape.contains(&0) {
        for (length, stride) in shape.iter().zip(&strides).rev() {
            contiguous &= *length == 1 || *stride == expected;
            expected = expected.saturating_mul(*length);
        }
    }
    Ok(Imported {
        address: (tensor.data as u64).wrapping_add(tensor.byte_offset),
        device: (tensor.device.kind, tensor.device.id),
        dtype: if tensor.dtype.lanes == 1 { (tensor.dtype.code, tensor.dtype.bits) } else { (255, 0) },
        shape: shape.iter().map(|&n| n.max(0) as u64).collect(),
        contiguous,
        writable: flags & READ_ONLY == 0,
    })
}

/// Host memory of others as a device: what a save from it reads, and what state is fetched into.
#[derive(Debug)]
pub struct Foreign {
    /// First address and length of what may be used, sorted.
    ranges: Arc<Vec<(u64, u64)>>,
    writable: bool,
    host: gpudirect::driver::host::HostDriver,
}

impl Foreign {
    /// A device that has these ranges of addresses. They are taken on the word of `nvtier.torch`, `nvtier.numpy` and
    /// `nvtier.save`, which alone call this module's `save`: each is memory of a tensor that they hold until it returns.
    pub fn new(mut ranges: Vec<(u64, u64)>) -> Foreign {
        ranges.sort_unstable();
        Foreign { ranges: Arc::new(ranges), writable: false, host: Default::default() }
    }

    /// Ranges that may be written, too: each is memory of a tensor that `nvtier.train` or `nvtier.load` keeps until what this is made for is over
    /// (`Target::keep`), and that nobody else uses meanwhile.
    pub fn writable(ranges: Vec<(u64, u64)>) -> Foreign {
        Foreign { writable: true, ..Foreign::new(ranges) }
    }
}

impl Driver for Foreign {
    fn info(&self) -> gpudirect::Result<DeviceInfo> {
        self.host.info()
    }
    fn pin(&self, _: &Arena) -> gpudirect::Result<()> {
        Ok(())
    }
    fn unpin(&self, _: &Arena) -> gpudirect::Result<()> {
        Ok(())
    }
    fn alloc(&self, _: u64) -> gpudirect::Result<u64> {
        Err(Error::new(ErrorKind::Unsupported, "allocate memory of others"))
    }
    fn free(&self, _: u64) -> gpudirect::Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "free memory of others"))
    }
    fn stream(&self) -> gpudirect::Result<Box<dyn Stream>> {
        Ok(Box::new(Copies { ranges: self.ranges.clone(), writable: self.writable, done: VecDeque::new() }))
    }
    fn copy_within(&self, _: &[DeviceCopy]) -> gpudirect::Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "write to memory that is only saved from"))
    }
    fn check_range(&self, address: u64, len: u64) -> gpudirect::Result<()> {
        outside(&self.ranges, address, len)
    }
}

/// Refuses what is not inside one of the ranges, which are sorted.
fn outside(ranges: &[(u64, u64)], address: u64, len: u64) -> gpudirect::Result<()> {
    let at = ranges.partition_point(|&(start, _)| start <= address);
    // Ranges may overlap: views of one tensor.
    let inside = ranges[..at].iter().rev().any(|&(start, size)| {
        address.checked_add(len).is_some_and(|end| start.checked_add(size).is_some_and(|last| end <= last))
    });
    if inside {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Device, format!("{len} bytes at {address:#x}: outside the tensors")))
}

/// Copies that are over when they were started.
struct Copies {
    ranges: Arc<Vec<(u64, u64)>>,
    writable: bool,
    done: VecDeque<Batch>,
}

impl Copies {
    fn carry_out(&self, batch: &mut Batch) -> gpudirect::Result<()> {
        if batch.direction != Direction::ToHost && !self.writable {
            return Err(Error::new(ErrorKind::Invalid, "write to memory that is only saved from"));
        }
        for part in &batch.parts {
            // Both ways alike: a buffer of ours and its range.
            let room = batch.buffers.get_mut(part.buffer as usize).and_then(|buffer| {
                let end = part.offset.checked_add(part.len)?;
                buffer.get_mut(part.offset..end)
            });
            let Some(room) = room else {
                let context = format!("copy {} bytes at {} of a buffer", part.len, part.offset);
                return Err(Error::new(ErrorKind::Invalid, context));
            };
            outside(&self.ranges, part.device, part.len as u64)?;
            match batch.direction {
                // SAFETY: the source is inside one range, which is memory of a tensor that the caller holds (see `Foreign::new`); `room` has `part.len` bytes
                // and is a buffer of ours, so the two do not overlap.
                Direction::ToHost => unsafe {
                    std::ptr::copy_nonoverlapping(part.device as *const u8, room.as_mut_ptr(), part.len);
                },
                // SAFETY: as above, the other way; nobody else uses the range meanwhile (see `Foreign::writable`).
                Direction::ToDevice => unsafe {
                    std::ptr::copy_nonoverlapping(room.as_ptr(), part.device as *mut u8, part.len);
                },
            }
        }
        Ok(())
    }
}

impl Stream for Copies {
    fn copy(&mut self, mut batch: Batch) -> std::result::Result<(), Refused> {
        match self.carry_out(&mut batch) {
            Ok(()) => {
                self.done.push_back(batch);
                Ok(())
            }
            Err(error) => Err(Refused { batch, error }),
        }
    }
    fn reap(&mut self, _: bool, each: &mut dyn FnMut(Batch)) -> gpudirect::Result<usize> {
        let count = self.done.len();
        self.done.drain(..).for_each(each);
        Ok(count)
    }
    fn in_flight(&self) -> usize {
        self.done.len()
    }
    fn shuffle(&mut self, _: &Arc<Move>) -> gpudirect::Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "gather or scatter memory that is only saved from"))
    }
    fn finish(&mut self, each: &mut dyn FnMut(Batch)) -> gpudirect::Result<()> {
        self.reap(true, each).map(drop)
    }
}

/// Digests of ranges of host memory, by several threads. The ranges are taken on the word of `nvtier.kv`: each is memory of a tensor that it
/// holds until this returns.
pub fn digests(ranges: &[(u64, u64)]) -> Vec<[u8; 32]> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let digests = std::sync::Mutex::new(vec![[0; 32]; ranges.len()]);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(16);
    let work = || {
        loop {
            let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some((address, len)) = ranges.get(index) else { return };
            let digest = match len {
                0 => blake3::hash(&[]),
                len => {
                    // SAFETY: memory of a tensor that the caller holds and nobody writes to, see above; `u8` has no alignment.
                    let bytes = unsafe { std::slice::from_raw_parts(*address as *const u8, *len as usize) };
                    blake3::hash(bytes)
                }
            };
            digests.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[index] = *digest.as_bytes();
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    digests.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Planes of KV blocks in host memory of others.
pub struct HostPlanes {
    planes: Vec<u64>,
    shape: gpudirect::paged::BlockShape,
}

impl HostPlanes {
    /// Of a layout that was checked against the ranges of a [`Foreign`]: every block of it is inside memory of a tensor that the caller holds,
    /// and no two rows share bytes.
    pub fn new(paged: &gpudirect::paged::Paged) -> HostPlanes {
        HostPlanes {
            planes: paged.planes().iter().map(|plane| plane.address).collect(),
            shape: *paged.shape(),
        }
    }

    /// Calls `each` with the address and the offset in a block of every run, and its length.
    fn runs(&self, block: u32, len: usize, each: &mut dyn FnMut(u64, usize, usize)) -> gpudirect::Result<()> {
        let shape = &self.shape;
        let (tokens, heads) = (u64::from(shape.tokens), u64::from(shape.heads));
        let bytes = shape.row * tokens * heads * self.planes.len() as u64;
        if block >= shape.blocks || len as u64 != bytes {
            let context = format!("block {block} of {}, {len} bytes of {bytes}", shape.blocks);
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        // Tokens without gaps are one run.
        let (count, run) = match shape.token_stride == shape.row || tokens == 1 {
            true => (1, shape.row * tokens),
            false => (tokens, shape.row),
        };
        let mut at = 0;
        for plane in &self.planes {
            let start = plane + u64::from(block) * shape.block_stride;
            for head in 0..heads {
                for token in 0..count {
                    each(start + head * shape.head_stride + token * shape.token_stride, at, run as usize);
                    at += run as usize;
                }
            }
        }
        Ok(())
    }

    /// Copies a block out of the planes.
    pub fn gather(&self, block: u32, out: &mut [u8]) -> gpudirect::Result<()> {
        let len = out.len();
        self.runs(block, len, &mut |address, at, run| {
            let to = &mut out[at..at + run];
            // SAFETY: the run is inside a plane, which is memory of a tensor that the caller holds (see `new`); `to` is a buffer of ours of the
            // same length.
            unsafe { std::ptr::copy_nonoverlapping(address as *const u8, to.as_mut_ptr(), run) };
        })
    }

    /// Copies a block into the planes.
    pub fn scatter(&self, block: u32, from: &[u8]) -> gpudirect::Result<()> {
        self.runs(block, from.len(), &mut |address, at, run| {
            let from = &from[at..at + run];
            // SAFETY: as in `gather`; the caller lets nobody else use these bytes of the tensors meanwhile.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), address as *mut u8, run) };
        })
    }
}
