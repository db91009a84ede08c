//! CUDA virtual memory management.
//! <https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html>

#![allow(unsafe_code)]

use std::ffi::c_int;

use cudarc::driver::sys;

use super::{Context, CudaDriver, check, size};
use crate::driver::VirtualMemory;
use crate::error::Result;

/// Memory of this device, for this process alone.
fn properties(cuda: &Context) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: location(cuda),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn location(cuda: &Context) -> sys::CUmemLocation {
    sys::CUmemLocation {
        type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
        id: cuda.device as c_int,
    }
}

impl VirtualMemory for CudaDriver {
    fn granularity(&self) -> Result<u64> {
        self.0.enter()?;
        let mut granularity = 0;
        let properties = properties(&self.0);
        let option = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        // SAFETY: `granularity` is valid for writes, the properties for reads.
        let result = unsafe { sys::cuMemGetAllocationGranularity(&mut granularity, &properties, option) };
        check(result, || format!("ask for the granularity of memory of cuda:{}", self.0.ordinal))?;
        Ok(granularity as u64)
    }

    fn reserve(&self, len: u64) -> Result<u64> {
        self.0.enter()?;
        let mut address = 0;
        // SAFETY: `address` is valid for writes; alignment, address and flags are left to the driver.
        let result = unsafe { sys::cuMemAddressReserve(&mut address, size(len), 0, 0, 0) };
        check(result, || format!("reserve {len} bytes of addresses of cuda:{}", self.0.ordinal))?;
        Ok(address)
    }

    fn unreserve(&self, address: u64, len: u64) -> Result<()> {
        self.0.enter()?;
        // SAFETY: the driver refuses what was not reserved so.
        let result = unsafe { sys::cuMemAddressFree(address, size(len)) };
        check(result, || format!("give {len} bytes of addresses of cuda:{} back", self.0.ordinal))
    }

    fn create(&self, len: u64) -> Result<u64> {
        self.0.enter()?;
        let mut physical = 0;
        let properties = properties(&self.0);
        // SAFETY: `physical` is valid for writes, the properties for reads; flags must be 0.
        let result = unsafe { sys::cuMemCreate(&mut physical, size(len), &properties, 0) };
        check(result, || format!("take {len} bytes of physical memory of cuda:{}", self.0.ordinal))?;
        Ok(physical)
    }

    fn release(&self, physical: u64) -> Result<()> {
        self.0.enter()?;
        // SAFETY: a handle that `create` gave, released once.
        check(unsafe { sys::cuMemRelease(physical) }, || {
            format!("give physical memory of cuda:{} back", self.0.ordinal)
        })
    }

    fn map(&self, address: u64, len: u64, physical: u64) -> Result<()> {
        self.0.enter()?;
        // SAFETY: the driver refuses addresses that are not reserved or are in use; offset and flags must be 0.
        let result = unsafe { sys::cuMemMap(address, size(len), 0, physical, 0) };
        check(result, || format!("map {len} bytes at {address:#x} of cuda:{}", self.0.ordinal))?;
        let access = sys::CUmemAccessDesc {
            location: location(&self.0),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the range was mapped by the call above; one description is passed.
        let result = unsafe { sys::cuMemSetAccess(address, size(len), &access, 1) };
        check(result, || format!("make {len} bytes at {address:#x} of cuda:{} usable", self.0.ordinal))
            .inspect_err(|_| {
                // SAFETY: exactly what was mapped above, and nothing used it.
                unsafe { sys::cuMemUnmap(address, size(len)) };
            })
    }

    fn unmap(&self, address: u64, len: u64) -> Result<()> {
        self.0.enter()?;
        // SAFETY: a range that `map` mapped, as the trait asks; nothing on the device uses it any more.
        let result = unsafe { sys::cuMemUnmap(address, size(len)) };
        check(result, || format!("unmap {len} bytes at {address:#x} of cuda:{}", self.0.ordinal))
    }
}
