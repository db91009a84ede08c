//! Copies and moves in order, each batch with the memory that it uses.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::c_int;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::{Context, check, explain};
use crate::driver::{Batch, DeviceCopy, Direction, Lent, Refused, Stream};
use crate::error::Result;
use crate::paged::Move;

/// Batches of fewer copies are made one by one: the driver's batch call pays off from a few on.
const BATCH_MIN: usize = 4;

/// `cuMemcpyBatchAsync` as CUDA 12.8 has it; later drivers keep that symbol.
pub(super) type CopyBatch = unsafe extern "C" fn(
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

/// A stream in the current context that waits for no other one; whoever gets it destroys it.
fn make() -> Result<sys::CUstream> {
    let mut stream = std::ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: `stream` is valid for writes.
    check(unsafe { sys::cuStreamCreate(&mut stream, flags) }, || "make a copy stream".into())?;
    Ok(stream)
}

/// A stream of its own for a few copies, waited for when it goes.
pub(super) struct Once(sys::CUstream);

impl Once {
    /// Makes it in the current context.
    pub fn new() -> Result<Once> {
        Ok(Once(make()?))
    }

    /// Starts all and waits for them.
    pub fn copy(&self, moves: &[DeviceCopy]) -> Result<()> {
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
        // SAFETY: made in `new`, destroyed once; what it still runs ends by itself, in memory of the device.
        unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}

/// One copy.
struct Range {
    host: u64,
    device: u64,
    len: usize,
}

impl Range {
    fn ends_at(&self, host: u64, device: u64) -> bool {
        self.host + self.len as u64 == host && self.device + self.len as u64 == device
    }
}

/// Copies and moves in order.
pub(super) struct CudaStream {
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
    /// Makes one.
    pub fn new(cuda: &Arc<Context>) -> Result<CudaStream> {
        cuda.enter()?;
        let (stream, copy_batch) = (make()?, cuda.copy_batch);
        Ok(CudaStream {
            cuda: cuda.clone(),
            stream,
            copy_batch,
            running: VecDeque::new(),
            events: Vec::new(),
        })
    }

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

    /// Puts the batch's copies into the stream, and an event behind them. What follows each other on both sides is one copy: the pauses between copies
    /// are a tenth of the bus where both ways are in use.
    fn issue(&mut self, batch: &mut Batch, event: sys::CUevent) -> Result<()> {
        let direction = batch.direction;
        let owned = batch.buffers.iter_mut().map(|buffer| buffer.as_mut_ptr() as u64);
        let hosts: Vec<u64> = owned.chain(batch.lent.iter().map(Lent::address)).collect();
        // Only pieces of one arena, which the driver knows as a whole, may be gone over by one copy.
        let follows: Vec<bool> =
            batch.buffers.windows(2).map(|pair| pair[0].is_followed_by(&pair[1])).collect();
        let mut ranges: Vec<Range> = Vec::with_capacity(batch.parts.len());
        let mut before = None;
        for part in &batch.parts {
            let (index, host) = (part.buffer as usize, hosts[part.buffer as usize] + part.offset as u64);
            let one_memory = before == Some(index) && index < batch.buffers.len()
                || index > 0 && before == Some(index - 1) && follows.get(index - 1) == Some(&true);
            before = Some(index);
            match ranges.last_mut() {
                Some(last) if one_memory && last.ends_at(host, part.device) => last.len += part.len,
                _ => ranges.push(Range { host, device: part.device, len: part.len }),
            }
        }
        let batched = match self.copy_batch {
            Some(function) if ranges.len() >= BATCH_MIN => self.issue_batch(function, direction, &ranges)?,
            _ => false,
        };
        if !batched {
            for Range { host, device, len } in ranges {
                let result = match direction {
                    // SAFETY: `check` found each part inside its buffer or what was lent, and a range is parts that follow each other; the stream keeps
                    // them until the event behind this copy has happened; the driver refuses device addresses that are not allocated.
                    Direction::ToDevice => unsafe {
                        sys::cuMemcpyHtoDAsync_v2(device, host as *const _, len, self.stream)
                    },
                    // SAFETY: as above; the batch owns the buffers, so nobody else reads or writes them meanwhile.
                    Direction::ToHost => unsafe {
                        sys::cuMemcpyDtoHAsync_v2(host as *mut _, device, len, self.stream)
                    },
                };
                check(result, || format!("copy {len} bytes, device address {device:#x}"))?;
            }
        }
        // SAFETY: both handles are ours and alive.
        check(unsafe { sys::cuEventRecord(event, self.stream) }, || "record an event".into())
    }

    /// All copies by one call. False: this driver will not have it so, nothing was started, they are to go one by one.
    fn issue_batch(&mut self, function: CopyBatch, direction: Direction, ranges: &[Range]) -> Result<bool> {
        let mut hosts: Vec<u64> = ranges.iter().map(|range| range.host).collect();
        let mut devices: Vec<u64> = ranges.iter().map(|range| range.device).collect();
        let mut sizes: Vec<usize> = ranges.iter().map(|range| range.len).collect();
        let on_host = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_HOST, id: 0 };
        let on_device = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: self.cuda.ordinal as c_int,
        };
        let (to, from, src, dst) = match direction {
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
        // Addresses as in `issue`: host ranges are made of buffers that the stream keeps until its event.
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

    fn wait_event(&mut self, event: u64) -> Result<()> {
        if event == 0 {
            return Ok(());
        }
        self.cuda.enter()?;
        // SAFETY: the stream is ours; the event is one of this process by its caller's word, who keeps it until this returns, which is when the driver
        // has taken note of it; handles that are none are refused.
        let result = unsafe { sys::cuStreamWaitEvent(self.stream, event as sys::CUevent, 0) };
        check(result, || "wait for an event".into())
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
            Err(_) => {
                self.events.push(event);
                // A part of its launches may run: the caller may free their memory as soon as it hears of the error.
                self.drained();
            }
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
        // SAFETY: made by `new`, destroyed once, idle.
        unsafe { sys::cuStreamDestroy_v2(self.stream) };
    }
}
