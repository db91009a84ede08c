//! The real libcufile, by a table of its functions that is looked up at run time.
//!
//! The table is our own: cudarc's has no `libcufile.so.0`, the only name that the run-time package installs, and reads error
//! codes as a closed enum, which codes of newer libraries are not in. Types and values follow `cufile.h` of release 1.20.
//!
//! **Who owns what.** A descriptor stays open until its handle was deregistered. Memory is read into only inside ranges that
//! were registered here and not yet deregistered; that it stays allocated for so long is promised by who registers it
//! ([`super::Staging`]). The library is never unloaded.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_long, c_uint, c_void};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::names::{self, DRIVER_ALREADY_OPEN};
use super::{CuFile, FileHandle, Properties, ReadCounts};
use crate::error::{Error, ErrorKind, Result};

/// `CUfileError_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Status {
    code: c_int,
    cuda: c_int,
}

/// `CUfileDrvProps_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct DriverProperties {
    major_version: c_uint,
    minor_version: c_uint,
    poll_thresh_size: usize,
    max_direct_io_size: usize,
    dstatusflags: c_uint,
    dcontrolflags: c_uint,
    fflags: c_uint,
    max_device_cache_size: c_uint,
    per_buffer_cache_size: c_uint,
    max_device_pinned_mem_size: c_uint,
    max_batch_io_size: c_uint,
    max_batch_io_timeout_msecs: c_uint,
    /// Releases may append to the structure.
    reserve: [u64; 32],
}

/// `CUfileDescr_t` of a Linux descriptor.
#[repr(C)]
struct Description {
    kind: c_int,
    handle: Descriptor,
    fs_ops: *const c_void,
}

/// The union in `CUfileDescr_t`.
#[repr(C)]
union Descriptor {
    fd: c_int,
    pointer: *mut c_void,
}

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
const OPAQUE_FD: c_int = 1;
/// Bits of `dstatusflags` and `dcontrolflags`.
const NVME_SUPPORTED: c_uint = 1 << 4;
const NVME_P2P_SUPPORTED: c_uint = 1 << 11;
const ALLOW_COMPAT_MODE: c_uint = 1 << 1;
/// `CUFileBoolConfigParameter_t`.
const PARAM_ALLOW_COMPAT_MODE: c_int = 1;
const PARAM_FORCE_COMPAT_MODE: c_int = 2;
const PARAM_USE_PCIP2PDMA: c_int = 7;
const PARAM_GDS_FALLBACK_IO: c_int = 13;
/// `CUFileStringConfigParameter_t`.
const PARAM_LOGFILE_PATH: c_int = 1;

type Handle = *mut c_void;

/// Every function that is called. Those that older libraries lack are optional.
struct Api {
    driver_open: unsafe extern "C" fn() -> Status,
    driver_close: unsafe extern "C" fn() -> Status,
    driver_properties: unsafe extern "C" fn(*mut DriverProperties) -> Status,
    handle_register: unsafe extern "C" fn(*mut Handle, *mut Description) -> Status,
    handle_deregister: unsafe extern "C" fn(Handle),
    buf_register: unsafe extern "C" fn(*const c_void, usize, c_int) -> Status,
    buf_deregister: unsafe extern "C" fn(*const c_void) -> Status,
    read: unsafe extern "C" fn(Handle, *mut c_void, usize, c_long, c_long) -> isize,
    write: unsafe extern "C" fn(Handle, *const c_void, usize, c_long, c_long) -> isize,
    version: Option<unsafe extern "C" fn(*mut c_int) -> Status>,
    set_bool: Option<unsafe extern "C" fn(c_int, bool) -> Status>,
    get_bool: Option<unsafe extern "C" fn(c_int, *mut bool) -> Status>,
    set_string: Option<unsafe extern "C" fn(c_int, *const c_char) -> Status>,
    stats_level: Option<unsafe extern "C" fn(c_int) -> Status>,
    stats_start: Option<unsafe extern "C" fn() -> Status>,
    stats_stop: Option<unsafe extern "C" fn() -> Status>,
    stats: Option<unsafe extern "C" fn(*mut c_void) -> Status>,
}

/// Where `CUfileStatsLevel3_t` of a release has its number of GPUs, and the first of their structures. Looked up in the headers of
/// releases 1.15 to 1.20; later ones may have grown, and are not guessed.
fn stats_layout(version: c_int) -> Option<(usize, usize)> {
    match version {
        1150..1190 => Some((1024, 1032)),
        1190..1210 => Some((1136, 1144)),
        _ => None,
    }
}

/// `CUfilePerGpuStats_t`: its size, and its counters of reads.
const GPU_STATS: usize = 248;
const N_TOTAL: usize = 48;
const N_P2P: usize = 56;
const N_NVFS: usize = 64;
const N_POSIX: usize = 72;
/// `maxGpus`.
const GPUS_MAX: usize = 16;
/// Level 3: per GPU.
const STATS_LEVEL: c_int = 3;

impl Api {
    /// Loads a library of this name or path. `None`: it is not there.
    fn load(name: &str) -> Result<Option<Api>> {
        // SAFETY: the initialisers of libcufile are NVIDIA's; they touch nothing of ours.
        let Ok(library) = (unsafe { libloading::Library::new(name) }) else { return Ok(None) };
        // Its threads and exit handlers outlive every user.
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        macro_rules! find {
            ($name:literal) => {
                // SAFETY: the field's type is that of cufile.h for this symbol.
                match unsafe { library.get(concat!($name, "\0").as_bytes()) } {
                    Ok(symbol) => *symbol,
                    Err(_) => {
                        let context = format!("load {name}: it lacks {}; another release is needed", $name);
                        return Err(Error::new(ErrorKind::OldDriver, context));
                    }
                }
            };
        }
        macro_rules! may {
            ($name:literal) => {
                // SAFETY: as above.
                unsafe { library.get(concat!($name, "\0").as_bytes()) }.ok().map(|symbol| *symbol)
            };
        }
        Ok(Some(Api {
            driver_open: find!("cuFileDriverOpen"),
            // The header maps the plain name to this one since CUDA 12.
            driver_close: match may!("cuFileDriverClose_v2") {
                Some(close) => close,
                None => find!("cuFileDriverClose"),
            },
            driver_properties: find!("cuFileDriverGetProperties"),
            handle_register: find!("cuFileHandleRegister"),
            handle_deregister: find!("cuFileHandleDeregister"),
            buf_register: find!("cuFileBufRegister"),
            buf_deregister: find!("cuFileBufDeregister"),
            read: find!("cuFileRead"),
            write: find!("cuFileWrite"),
            version: may!("cuFileGetVersion"),
            set_bool: may!("cuFileSetParameterBool"),
            get_bool: may!("cuFileGetParameterBool"),
            set_string: may!("cuFileSetParameterString"),
            stats_level: may!("cuFileSetStatsLevel"),
            stats_start: may!("cuFileStatsStart"),
            stats_stop: may!("cuFileStatsStop"),
            stats: may!("cuFileGetStatsL3"),
        }))
    }
}

fn check(status: Status, tried: impl FnOnce() -> String) -> Result<()> {
    match status.code {
        0 => Ok(()),
        code => Err(names::error(&tried(), code, status.cuda)),
    }
}

/// The process's libcufile. Opened once; closed when its last user is gone.
#[derive(Clone, Debug)]
pub struct Library(Arc<Inner>);

struct Inner {
    api: Api,
    /// cuFile does not survive fork(2).
    pid: u32,
    /// Somebody else in this process had opened the driver, and so chose its settings.
    was_open: bool,
    /// Registered memory: address and length.
    registered: Mutex<BTreeMap<u64, u64>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("libcufile").field("was_open", &self.was_open).finish()
    }
}

static CURRENT: Mutex<Weak<Inner>> = Mutex::new(Weak::new());

/// Opens libcufile. CUDA must have been started before.
pub fn open() -> Result<Library> {
    let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(inner) = current.upgrade() {
        return Ok(Library(inner));
    }
    for name in ["libcufile.so.0", "libcufile.so"] {
        if let Some(api) = Api::load(name)? {
            let library = Library::start(api)?;
            *current = Arc::downgrade(&library.0);
            return Ok(library);
        }
    }
    let context = "load cuFile: libcufile.so.0 is not installed (package libcufile of the CUDA toolkit, or nvidia-cufile; \
                   its folder may have to be in LD_LIBRARY_PATH)";
    Err(Error::new(ErrorKind::Unsupported, context))
}

impl Library {
    fn start(api: Api) -> Result<Library> {
        let mut was_open = false;
        if let Some(set) = api.set_bool {
            for (param, value) in [
                (PARAM_ALLOW_COMPAT_MODE, false),
                (PARAM_FORCE_COMPAT_MODE, false),
                (PARAM_GDS_FALLBACK_IO, false),
                (PARAM_USE_PCIP2PDMA, true),
            ] {
                // SAFETY: takes plain values. What a release does not know it refuses; what came of it is asked for later.
                let status = unsafe { set(param, value) };
                was_open |= status.code == DRIVER_ALREADY_OPEN;
            }
        }
        if let Some(set) = api.set_string
            && std::env::var_os("CUFILE_LOGFILE_PATH").is_none()
            && let Ok(path) = CString::new("/dev/null")
        {
            // It writes cufile.log into the current folder otherwise.
            // SAFETY: a NUL-terminated string that the library copies.
            unsafe { set(PARAM_LOGFILE_PATH, path.as_ptr()) };
        }
        // SAFETY: no arguments.
        let status = unsafe { (api.driver_open)() };
        if status.code != DRIVER_ALREADY_OPEN {
            check(status, || "open the cuFile driver".into())?;
        }
        was_open |= status.code == DRIVER_ALREADY_OPEN;
        Ok(Library(Arc::new(Inner { api, pid: std::process::id(), was_open, registered: Mutex::default() })))
    }

    fn enter(&self) -> Result<&Api> {
        if std::process::id() != self.0.pid {
            let context = "use cuFile in a process that was forked after it was opened, which cuFile does not allow: start \
                           workers by spawn instead of fork";
            return Err(Error::new(ErrorKind::Device, context));
        }
        Ok(&self.0.api)
    }

    /// As the library has it: 1000 x major + 10 x minor; 0 where it cannot say.
    fn version(&self) -> c_int {
        let mut version: c_int = 0;
        match self.0.api.version {
            // SAFETY: `version` is valid for writes.
            Some(get) if unsafe { get(&mut version) }.code == 0 && version > 0 => version,
            _ => 0,
        }
    }

    /// Refuses ranges that are not inside memory that was registered.
    fn inside(&self, base: u64, at: u64, len: usize) -> Result<()> {
        let registered = self.0.registered.lock().unwrap_or_else(PoisonError::into_inner);
        let room = registered.get(&base).copied().unwrap_or(0);
        match at.checked_add(len as u64) {
            Some(end) if end <= room && len > 0 => Ok(()),
            _ => {
                let context =
                    format!("use {len} bytes at {at} of device memory of which {room} are registered");
                Err(Error::new(ErrorKind::Invalid, context))
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if std::process::id() == self.pid && !self.was_open {
            // SAFETY: opened by `start`; handles hold the library, so none is left.
            let status = unsafe { (self.api.driver_close)() };
            if status.code != 0 {
                tracing::debug!("close the cuFile driver: {}", names::describe(status.code));
            }
        }
    }
}

impl CuFile for Library {
    fn properties(&self) -> Result<Properties> {
        let api = self.enter()?;
        let mut raw = DriverProperties::default();
        // SAFETY: `raw` is at least as large as the structure of every release.
        check(unsafe { (api.driver_properties)(&mut raw) }, || {
            "ask the cuFile driver for its properties".into()
        })?;
        let mut compat_allowed = raw.dcontrolflags & ALLOW_COMPAT_MODE != 0;
        let mut value = true;
        if let Some(get) = api.get_bool
            // SAFETY: `value` is valid for writes.
            && unsafe { get(PARAM_ALLOW_COMPAT_MODE, &mut value) }.code == 0
        {
            // A driver that was open before keeps the settings that it was opened with.
            compat_allowed = value || (self.0.was_open && compat_allowed);
        }
        Ok(Properties {
            library: match self.version() {
                0 => String::new(),
                version => format!("{}.{}", version / 1000, version % 1000 / 10),
            },
            nvidia_fs: (raw.major_version, raw.minor_version),
            nvme: raw.dstatusflags & NVME_SUPPORTED != 0,
            nvme_p2p: raw.dstatusflags & NVME_P2P_SUPPORTED != 0,
            compat_allowed,
            max_direct_io_bytes: raw.max_direct_io_size as u64 * 1024,
            max_pinned_bytes: u64::from(raw.max_device_pinned_mem_size) * 1024,
        })
    }

    fn open_file(&self, file: File, name: &str) -> Result<Box<dyn FileHandle>> {
        let api = self.enter()?;
        let mut description = Description {
            kind: OPAQUE_FD,
            handle: Descriptor { pointer: std::ptr::null_mut() },
            fs_ops: std::ptr::null(),
        };
        description.handle.fd = file.as_raw_fd();
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: both are valid for the call; the descriptor is open and stays so until the handle is deregistered.
        let status = unsafe { (api.handle_register)(&mut handle, &mut description) };
        check(status, || format!("give {name} to cuFile"))?;
        Ok(Box::new(Open { library: self.clone(), handle, name: name.to_owned(), _file: file }))
    }

    fn register(&self, address: u64, len: u64) -> Result<()> {
        let api = self.enter()?;
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        // SAFETY: device memory of this length that stays allocated until `deregister`, as the trait asks.
        let status = unsafe { (api.buf_register)(address as *const c_void, size, 0) };
        check(status, || format!("register {len} bytes of device memory with cuFile"))?;
        self.0.registered.lock().unwrap_or_else(PoisonError::into_inner).insert(address, len);
        Ok(())
    }

    fn deregister(&self, address: u64) -> Result<()> {
        let api = self.enter()?;
        let known = self.0.registered.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
        if known.is_none() {
            let context = format!("deregister device memory at {address:#x}, which is not registered");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        // SAFETY: registered by `register`; no read uses it, as the trait asks.
        let status = unsafe { (api.buf_deregister)(address as *const c_void) };
        check(status, || format!("deregister device memory at {address:#x}"))
    }

    fn count_reads(&self, on: bool) {
        let (Ok(api), Some(_)) = (self.enter(), stats_layout(self.version())) else { return };
        let (Some(level), Some(start), Some(stop)) = (api.stats_level, api.stats_start, api.stats_stop)
        else {
            return;
        };
        // Whether it took effect shows in the counts.
        // SAFETY: they take plain values.
        unsafe {
            if on {
                level(STATS_LEVEL);
                start();
            } else {
                stop();
                level(0);
            }
        }
    }

    fn counted(&self) -> Option<ReadCounts> {
        let api = self.enter().ok()?;
        let (count_at, first) = stats_layout(self.version())?;
        // Twice as long as the longest structure that is known.
        let mut raw = vec![0u64; 2048];
        // SAFETY: `raw` is aligned and long enough for the structure of every release that `stats_layout` knows.
        if unsafe { (api.stats?)(raw.as_mut_ptr().cast()) }.code != 0 {
            return None;
        }
        let gpus = (raw[count_at / 8] as u32 as usize).min(GPUS_MAX);
        let sum = |field: usize| {
            (0..gpus).map(|gpu| raw[(first + gpu * GPU_STATS + field) / 8]).fold(0u64, u64::saturating_add)
        };
        Some(ReadCounts {
            total: sum(N_TOTAL),
            peer_to_peer: sum(N_P2P),
            nvidia_fs: sum(N_NVFS),
            posix: sum(N_POSIX),
        })
    }
}

/// A registered file.
#[derive(Debug)]
struct Open {
    library: Library,
    handle: Handle,
    name: String,
    _file: File,
}

// SAFETY: cuFile's handles may be used from any thread, and by several at once (its documentation, "Thread safety").
unsafe impl Send for Open {}
// SAFETY: see Send.
unsafe impl Sync for Open {}

impl Open {
    fn moved(&self, verb: &str, count: isize, len: usize, offset: u64) -> Result<usize> {
        let tried = || format!("{verb} {len} bytes at {offset} of {} by cuFile", self.name);
        match count {
            count if count > len as isize => {
                Err(Error::new(ErrorKind::Device, format!("{}: it says {count} bytes", tried())))
            }
            0.. => Ok(count as usize),
            -1 => Err(Error::io(tried(), std::io::Error::last_os_error())),
            code => Err(names::error(&tried(), (-code).try_into().unwrap_or(i32::MAX), 0)),
        }
    }

    fn place(&self, base: u64, at: u64, len: usize, offset: u64) -> Result<(c_long, c_long)> {
        self.library.inside(base, at, len)?;
        match (c_long::try_from(offset), c_long::try_from(at)) {
            (Ok(offset), Ok(at)) => Ok((offset, at)),
            _ => {
                Err(Error::new(ErrorKind::Invalid, format!("offset {offset} of {} is too large", self.name)))
            }
        }
    }
}

impl FileHandle for Open {
    fn read(&self, base: u64, at: u64, len: usize, offset: u64) -> Result<usize> {
        let api = self.library.enter()?;
        let (file_offset, memory_offset) = self.place(base, at, len, offset)?;
        // SAFETY: `place` found the range inside registered memory, which stays allocated until it is deregistered; the handle
        // is registered until Drop.
        let count = unsafe { (api.read)(self.handle, base as *mut c_void, len, file_offset, memory_offset) };
        self.moved("read", count, len, offset)
    }

    fn write(&self, base: u64, at: u64, len: usize, offset: u64) -> Result<usize> {
        let api = self.library.enter()?;
        let (file_offset, memory_offset) = self.place(base, at, len, offset)?;
        // SAFETY: as in `read`.
        let count =
            unsafe { (api.write)(self.handle, base as *const c_void, len, file_offset, memory_offset) };
        self.moved("write", count, len, offset)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Ok(api) = self.library.enter() {
            // SAFETY: registered in `open_file`, deregistered once; `&mut self` says that no call uses it.
            unsafe { (api.handle_deregister)(self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use nvme::Buffer;

    use super::*;

    /// A library in C that has cuFile's functions and reads into host memory: what is tested is our side of the interface.
    const STAND_IN: &str = include_str!("stand_in.c");

    fn build(folder: &std::path::Path) -> Option<String> {
        let (source, library) = (folder.join("stand_in.c"), folder.join("libstandin.so"));
        std::fs::write(&source, STAND_IN).unwrap();
        let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let built = std::process::Command::new(&cc)
            .args(["-shared", "-fPIC", "-o"])
            .arg(&library)
            .arg(&source)
            .status();
        match built {
            Ok(status) => {
                assert!(status.success(), "{cc} failed");
                Some(library.display().to_string())
            }
            Err(error) => {
                println!("skipped: no C compiler ({cc}): {error}");
                None
            }
        }
    }

    #[test]
    fn calls_cross_the_c_interface_as_the_header_says() {
        let folder = tempfile::tempdir().unwrap();
        let Some(path) = build(folder.path()) else { return };
        let api = Api::load(&path).unwrap().expect("it was just built");
        let library = Library::start(api).unwrap();
        let properties = library.properties().unwrap();
        let expected = Properties {
            library: "1.20".into(),
            nvidia_fs: (2, 30),
            nvme: true,
            nvme_p2p: true,
            compat_allowed: false,
            max_direct_io_bytes: 16 << 20,
            max_pinned_bytes: 1 << 30,
        };
        assert_eq!(properties, expected);
        let bytes = nvtier_tests::pattern(5, 100_000);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let handle = library.open_file(file, "m").unwrap();
        let mut memory = Buffer::heap(65_536).unwrap();
        let base = memory.as_mut_ptr() as u64;
        library.register(base, 65_536).unwrap();
        assert_eq!(handle.read(base, 4096, 8192, 1000).unwrap(), 8192);
        assert!(memory[4096..12_288] == bytes[1000..9192] && memory[12_288..].iter().all(|&byte| byte == 0));
        assert_eq!(handle.read(base, 0, 65_536, 99_000).unwrap(), 1000);
        assert_eq!(handle.write(base, 4096, 100, 0).unwrap(), 100);
        assert_eq!(handle.read(base, 0, 100, 0).unwrap(), 100);
        assert!(memory[..100] == bytes[1000..1100]);
        // Nothing outside what is registered is ever asked for.
        for (base, at, len) in [(base, 65_000, 1000), (base, u64::MAX, 2), (base + 1, 0, 1), (base, 0, 0)] {
            assert_eq!(handle.read(base, at, len, 0).unwrap_err().kind(), ErrorKind::Invalid);
        }
        // Negative results: -1 with errno, and codes of the library.
        let refused = handle.read(base, 0, 4096, 5008 << 32).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert!(refused.to_string().contains("CU_FILE_IO_NOT_SUPPORTED (5008)"), "{refused}");
        let failed = handle.read(base, 0, 4096, 1 << 32).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Io);
        let lower = std::error::Error::source(&failed).and_then(|error| error.downcast_ref::<nvme::Error>());
        assert_eq!(lower.and_then(nvme::Error::errno), Some(5), "{failed}");
        // Counted by the stand-in on its second GPU.
        assert_eq!(library.counted().map(|counts| counts.total), Some(0));
        library.count_reads(true);
        assert_eq!(handle.read(base, 0, 100, 0).unwrap(), 100);
        let counts = ReadCounts { total: 1, peer_to_peer: 10, nvidia_fs: 20, posix: 30 };
        assert_eq!(library.counted(), Some(counts));
        library.count_reads(false);
        handle.read(base, 0, 100, 0).unwrap();
        assert_eq!(library.counted(), Some(counts));
        drop(handle);
        library.deregister(base).unwrap();
        assert!(library.deregister(base).is_err());
        let too_many = library.register(base, 2 << 30).unwrap_err();
        assert!(too_many.to_string().contains("CU_FILE_CUDA_DRIVER_ERROR (5011)"), "{too_many}");
        assert!(too_many.to_string().contains("CUDA error 2"), "{too_many}");
    }

    #[test]
    fn a_machine_without_cufile_gets_an_error_that_names_the_library() {
        match open() {
            Ok(library) => println!("skipped: this machine has cuFile: {:?}", library.properties()),
            Err(error) if error.kind() == ErrorKind::OldDriver => panic!("{error}"),
            Err(error) => {
                println!("{error}");
                assert!(error.to_string().contains("cuFile"), "{error}");
            }
        }
        assert!(Api::load("libno-such-library.so.0").unwrap().is_none());
        // A library of another purpose is told apart, not called.
        let error = Api::load("libc.so.6").map(drop).unwrap_err();
        assert!(error.to_string().contains("cuFileDriverOpen"), "{error}");
    }
}
