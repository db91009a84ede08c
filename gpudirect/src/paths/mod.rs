//! Which ways there are from a drive to a device, which of them can be taken here, and why not.
//!
//! ```text
//! system       what /proc and /sys say of kernel, drivers, file system and drive
//! conditions   what each way needs, one by one
//! Paths        conditions -> library -> self-test (remembered) -> the way that a load takes
//! ```
//!
//! The bounce path always works. cuFile is taken where its conditions are met, its self-test found every byte right, and it is not
//! slower than the bounce path; and only for bytes that need no look from the host: not those of a pool whose checksums are
//! compared, not those in the page cache.

mod conditions;
mod system;

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nvme::Target;
use serde::{Deserialize, Serialize};

pub use conditions::Condition;
pub use system::{DriveKind, Place, System};

use crate::control::Control;
use crate::cufile::{self, CuFile, CuFileOptions, Properties, SelfTest, Subject, Verdict};
use crate::driver::DeviceInfo;
use crate::error::{Error, ErrorKind, Result};
use crate::lane::Lane;
use crate::remembered::Remembered;
use crate::report::NotTaken;
use crate::source::Source;

/// Drive, pinned memory, device.
pub const BOUNCE: &str = "bounce";
/// cuFile by the kernel module nvidia-fs.
pub const NVIDIA_FS: &str = "cuFile on nvidia-fs";
/// cuFile by the kernel's PCI peer-to-peer DMA.
pub const PEER_TO_PEER: &str = "cuFile by PCI peer-to-peer";
/// io_uring with a registered dma-buf.
pub const DMA_BUF: &str = "io_uring with a dma-buf";

/// Below this share of the bounce path's speed, cuFile counts as slower: two runs differ by as much.
const NOT_SLOWER: f64 = 0.97;

/// Which way a load is to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PathChoice {
    /// The best that can be trusted.
    #[default]
    Auto,
    /// The bounce path.
    Bounce,
    /// cuFile, or an error that says why not. It may be slower than the bounce path.
    CuFile,
}

/// How a way is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathOptions {
    /// Which way.
    pub choice: PathChoice,
    /// Self-tests are made again, whatever is remembered.
    pub retest: bool,
    /// Settings of cuFile.
    pub cufile: CuFileOptions,
}

/// What is known of a way.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PathState {
    /// Its name.
    pub path: &'static str,
    /// Whether a load would take it: `Some(true)` yes, `None` only a self-test can tell.
    pub usable: Option<bool>,
    /// Why not, or what is still open.
    pub why: String,
    /// What it needs, one by one.
    pub conditions: Vec<Condition>,
    /// What its self-test found here, where one was made.
    pub self_test: Option<SelfTest>,
}

/// All ways from a path to a device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Survey {
    /// The device.
    pub device: DeviceInfo,
    /// What the path lies on.
    pub place: Place,
    /// What cuFile's driver says of itself, where it was opened.
    pub cufile: Option<Properties>,
    /// The ways, best first; the last one is the bounce path, which always works.
    pub paths: Vec<PathState>,
}

/// Surveys this machine: reads `/proc` and `/sys`, opens libcufile where everything else is there, and looks up what self-tests
/// found. Makes no self-test: a load does, or [`Paths::test`].
pub fn survey(device: &DeviceInfo, path: &Path) -> Survey {
    Paths::here().survey(device, path)
}

type Open = Arc<dyn Fn() -> Result<Arc<dyn CuFile>> + Send + Sync>;

/// A driver that is open, and what it says of itself.
type OpenDriver = (Arc<dyn CuFile>, Properties);

/// A machine whose ways are looked at, and what is remembered of them. Clones share the library once it is open: opening it
/// takes a while.
#[derive(Clone)]
pub struct Paths {
    system: System,
    open: Open,
    opened: Arc<Mutex<Option<OpenDriver>>>,
    remembered: Remembered,
    not_slower: f64,
}

impl std::fmt::Debug for Paths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paths").field("system", &self.system).field("remembered", &self.remembered).finish()
    }
}

/// What is kept of a self-test.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    test: SelfTest,
}

/// The way that a load takes.
pub(crate) struct Decision {
    /// cuFile, by this library and under this name; none: the bounce path.
    pub cufile: Option<(Arc<dyn CuFile>, &'static str)>,
    /// Better ways that are not taken.
    pub not_taken: Vec<NotTaken>,
    /// Keys of self-tests that were relied on.
    pub relied_on: Vec<String>,
}

/// A way by cuFile, looked at.
struct Candidate {
    state: PathState,
    peer_to_peer: bool,
    key: String,
}

impl Paths {
    /// This machine.
    pub fn here() -> Paths {
        static HERE: OnceLock<Paths> = OnceLock::new();
        let open = || cufile::open().map(|library| Arc::new(library) as Arc<dyn CuFile>);
        HERE.get_or_init(|| Paths::of(System::here(), open, Remembered::in_cache("paths.json"))).clone()
    }

    /// A machine that a test made up.
    pub fn of(
        system: System,
        open: impl Fn() -> Result<Arc<dyn CuFile>> + Send + Sync + 'static,
        remembered: Remembered,
    ) -> Paths {
        Paths { system, open: Arc::new(open), opened: Arc::default(), remembered, not_slower: NOT_SLOWER }
    }

    /// From which share of the bounce path's speed on cuFile is taken.
    pub fn not_slower(self, share: f64) -> Paths {
        Paths { not_slower: share, ..self }
    }

    /// What is known of all ways from a path to a device.
    pub fn survey(&self, device: &DeviceInfo, path: &Path) -> Survey {
        let place = self.system.place(path);
        let mut library = Lazy::new(self);
        let mut paths: Vec<PathState> = Vec::new();
        if is_gpu(device) {
            paths.extend(self.candidates(device, &place, &mut library).into_iter().map(|one| one.state));
            paths.push(PathState {
                path: DMA_BUF,
                usable: Some(false),
                why: self.no_dma_buf(),
                conditions: Vec::new(),
                self_test: None,
            });
        }
        paths.push(PathState {
            path: BOUNCE,
            usable: Some(true),
            why: String::new(),
            conditions: Vec::new(),
            self_test: None,
        });
        Survey { device: device.clone(), place, cufile: library.properties(), paths }
    }

    /// Makes the self-test of the way that a load of this file would try, whatever is remembered, and remembers it.
    /// `None`: there is no such way here.
    pub fn test(
        &self,
        lane: &mut Lane,
        source: &Source,
        control: &mut Control<'_>,
    ) -> Result<Option<SelfTest>> {
        let device = lane.driver().info()?;
        let mut library = Lazy::new(self);
        let Some(place) = self.place_of(source) else { return Ok(None) };
        let options = PathOptions { retest: true, ..PathOptions::default() };
        for candidate in self.candidates(&device, &place, &mut library) {
            if candidate.state.usable != Some(false) || candidate.state.self_test.is_some() {
                return self.tested(lane, source, &candidate, &mut library, &options, control).map(Some);
            }
        }
        Ok(None)
    }

    fn no_dma_buf(&self) -> String {
        let kernel = self.system.kernel();
        let newer = self.system.kernel_version().is_none_or(|version| version >= (7, 4));
        let why = if newer { "" } else { ", and this kernel is older than Linux 7.4, which has it first" };
        format!("this version of nvtier does not have it{why} (the kernel is {kernel})")
    }

    /// The two ways of cuFile, best first, each with its conditions and with what is remembered of its self-test.
    fn candidates(&self, device: &DeviceInfo, place: &Place, library: &mut Lazy<'_>) -> Vec<Candidate> {
        let ways = [
            (NVIDIA_FS, false, conditions::nvidia_fs(&self.system, place)),
            (PEER_TO_PEER, true, conditions::peer_to_peer(&self.system, place, device)),
        ];
        ways.into_iter()
            .map(|(path, peer_to_peer, mut conditions)| {
                let mut key = String::new();
                // The library is started only where it has a chance: that takes a while, and starts threads.
                if unmet(&conditions).is_empty() {
                    match library.get() {
                        Ok((_, properties)) => {
                            conditions.extend(conditions::library(properties, peer_to_peer));
                            key = self.key(path, device, place, properties);
                        }
                        Err(why) => conditions.push(Condition {
                            needs: "libcufile can be opened",
                            met: Some(false),
                            found: why.clone(),
                        }),
                    }
                }
                let why = unmet(&conditions);
                let self_test = match key.is_empty() {
                    true => None,
                    false => self.remembered.get::<Kept>(&key).map(|kept| kept.test),
                };
                let (usable, why) = match (&self_test, why.is_empty()) {
                    (_, false) => (Some(false), why),
                    (None, true) => (None, "its conditions are met; its self-test was not made yet".into()),
                    (Some(test), true) => (Some(test.verdict == Verdict::Passed), test.why.clone()),
                };
                let state = PathState { path, usable, why, conditions, self_test };
                Candidate { state, peer_to_peer, key }
            })
            .collect()
    }

    fn key(&self, path: &str, device: &DeviceInfo, place: &Place, properties: &Properties) -> String {
        format!(
            "{path}|{}|{} {} {}|{}|{}|{:?}",
            self.system.identity(),
            device.name,
            device.pci,
            device.driver,
            place.identity(),
            properties.library,
            properties.nvidia_fs
        )
    }

    /// The place of a source that is one file.
    fn place_of(&self, source: &Source) -> Option<Place> {
        let [extent] = source.stored.as_slice() else { return None };
        let Target::Fd(fd) = extent.device.target() else { return None };
        Some(self.system.place(Path::new(&format!("/proc/self/fd/{}", fd.as_raw_fd()))))
    }

    /// The self-test's result: remembered, or made now.
    fn tested(
        &self,
        lane: &mut Lane,
        source: &Source,
        candidate: &Candidate,
        library: &mut Lazy<'_>,
        options: &PathOptions,
        control: &mut Control<'_>,
    ) -> Result<SelfTest> {
        if let (Some(test), false) = (&candidate.state.self_test, options.retest) {
            return Ok(test.clone());
        }
        let (cufile, _) =
            library.get().map_err(|why| Error::new(ErrorKind::Unsupported, format!("test cuFile: {why}")))?;
        let subject = Subject {
            cufile,
            system: &self.system,
            source,
            peer_to_peer: candidate.peer_to_peer,
            options: options.cufile,
            not_slower: self.not_slower,
        };
        let test = cufile::self_test(lane, &subject, control)?;
        self.remembered.put(&candidate.key, &Kept { test: test.clone() });
        Ok(test)
    }

    /// What a self-test found does not hold any more.
    pub(crate) fn forget(&self, keys: &[String]) {
        keys.iter().for_each(|key| self.remembered.forget(key));
    }

    /// cuFile for these sources, and the name of its way; an error where it cannot be trusted here, or would not be GPUDirect.
    /// Makes its self-test where none is remembered.
    pub fn cufile(
        &self,
        lane: &mut Lane,
        sources: &[Source],
        options: &PathOptions,
        control: &mut Control<'_>,
    ) -> Result<(Arc<dyn CuFile>, &'static str)> {
        let options = PathOptions { choice: PathChoice::CuFile, ..*options };
        let decision = self.decide(lane, sources, &options, control)?;
        decision.cufile.ok_or_else(|| Error::new(ErrorKind::Unsupported, "cuFile was not taken"))
    }

    /// Chooses the way of a load from these sources. With [`PathChoice::CuFile`] an error where it cannot be taken.
    pub(crate) fn decide(
        &self,
        lane: &mut Lane,
        sources: &[Source],
        options: &PathOptions,
        control: &mut Control<'_>,
    ) -> Result<Decision> {
        let device = lane.driver().info()?;
        let forced = options.choice == PathChoice::CuFile;
        let bounce = |not_taken| Ok(Decision { cufile: None, not_taken, relied_on: Vec::new() });
        let refuse = |why: &str| {
            Err(Error::new(ErrorKind::Unsupported, format!("load to {} by cuFile: {why}", device.id)))
        };
        if !is_gpu(&device) {
            return if forced { refuse("it is no CUDA device") } else { bounce(Vec::new()) };
        }
        let dma_buf = NotTaken { path: DMA_BUF, why: self.no_dma_buf() };
        if let Some(why) = no_cufile(sources, options) {
            let both = [NVIDIA_FS, PEER_TO_PEER].map(|path| NotTaken { path, why: why.clone() });
            return if forced { refuse(&why) } else { bounce([both.as_slice(), &[dma_buf]].concat()) };
        }
        let mut places: Vec<(Place, &Source)> = Vec::new();
        for source in sources.iter().filter(|source| !source.is_empty()) {
            let place = self.place_of(source).unwrap_or_default();
            match places.iter_mut().find(|(known, _)| *known == place) {
                // The longest file of a drive is the one to test with.
                Some((_, longest)) if longest.len() < source.len() => *longest = source,
                Some(_) => {}
                None => places.push((place, source)),
            }
        }
        let mut library = Lazy::new(self);
        let mut not_taken: Vec<NotTaken> = Vec::new();
        for (way, name) in [NVIDIA_FS, PEER_TO_PEER].into_iter().enumerate() {
            let mut relied_on = Vec::new();
            let mut why = None;
            for (place, source) in &places {
                let Some(candidate) = self.candidates(&device, place, &mut library).into_iter().nth(way)
                else {
                    break;
                };
                let on = if places.len() > 1 { format!("{}: ", place.describe()) } else { String::new() };
                why = match (candidate.state.self_test.is_some(), candidate.state.usable) {
                    (false, Some(false)) => Some(format!("{on}{}", candidate.state.why)),
                    _ if source.len() < cufile::FILE_MIN && candidate.state.self_test.is_none() => {
                        Some(format!("{on}the files are too small to test it with, and to gain by it"))
                    }
                    _ => match self.tested(lane, source, &candidate, &mut library, options, control) {
                        Ok(test) if test.verdict == Verdict::Passed => None,
                        Ok(test) if test.verdict == Verdict::Slower && forced => None,
                        Ok(test) => Some(format!("{on}{}", test.why)),
                        Err(error) if matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::Timeout) => {
                            return Err(error);
                        }
                        Err(error) => Some(format!("{on}its self-test could not be made: {error}")),
                    },
                };
                if why.is_some() {
                    break;
                }
                relied_on.push(candidate.key);
            }
            if why.is_none()
                && !places.is_empty()
                && let Ok((cufile, _)) = library.get()
            {
                not_taken.push(dma_buf);
                return Ok(Decision { cufile: Some((cufile.clone(), name)), not_taken, relied_on });
            }
            let why = why.unwrap_or_else(|| "there is nothing to read".into());
            not_taken.push(NotTaken { path: name, why });
        }
        if forced {
            let all: Vec<String> = not_taken.iter().map(|way| format!("{}: {}", way.path, way.why)).collect();
            return refuse(&all.join("; "));
        }
        not_taken.push(dma_buf);
        bounce(not_taken)
    }
}

/// Why cuFile is not even looked at for these sources.
fn no_cufile(sources: &[Source], options: &PathOptions) -> Option<String> {
    if options.choice == PathChoice::Bounce {
        return Some("the bounce path was asked for".into());
    }
    let count = |what: fn(&&Source) -> bool| sources.iter().filter(what).count();
    if count(|source| source.is_verified()) > 0 {
        return Some(
            "the pool's checksums are compared on the way (verify=always), for which the bytes must pass the host; --no-verify \
             leaves that to `nvtier verify`"
                .into(),
        );
    }
    let cached = count(|source| source.is_cached());
    if cached > 0 {
        return Some(format!(
            "{cached} of {} sources are read from memory (page cache, tmpfs), not from a drive",
            sources.len()
        ));
    }
    let is_file = |source: &Source| {
        matches!(source.stored.as_slice(), [extent] if extent.len == source.len()
            && matches!(extent.device.target(), Target::Fd(_))
            && extent.device.kind() == nvme::DeviceKind::File)
    };
    let other = sources.iter().find(|source| !source.is_empty() && !is_file(source))?;
    Some(format!("{} is not one file of a file system", other.name()))
}

fn is_gpu(device: &DeviceInfo) -> bool {
    device.id.starts_with("cuda") || device.id.starts_with("fake")
}

/// What is not met, in words; empty where nothing is known to be missing.
fn unmet(conditions: &[Condition]) -> String {
    let unmet: Vec<&str> =
        conditions.iter().filter(|one| one.met == Some(false)).map(|one| one.found.as_str()).collect();
    unmet.join("; ")
}

/// The library, opened when it is first asked for.
struct Lazy<'a> {
    paths: &'a Paths,
    state: Option<Opened>,
}

type Opened = std::result::Result<OpenDriver, String>;

impl<'a> Lazy<'a> {
    fn new(paths: &'a Paths) -> Lazy<'a> {
        Lazy { paths, state: None }
    }

    fn get(&mut self) -> std::result::Result<&OpenDriver, &String> {
        let paths = self.paths;
        self.state
            .get_or_insert_with(|| {
                let mut opened = paths.opened.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(opened) = &*opened {
                    return Ok(opened.clone());
                }
                let library = (paths.open)().map_err(|error| error.to_string())?;
                let properties = library.properties().map_err(|error| error.to_string())?;
                Ok(opened.insert((library, properties)).clone())
            })
            .as_ref()
    }

    /// Only what is known already.
    fn properties(&self) -> Option<Properties> {
        self.state.as_ref()?.as_ref().ok().map(|(_, properties)| properties.clone())
    }
}
