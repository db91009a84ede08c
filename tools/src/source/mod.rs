//! Where an import comes from: local files, read past the page cache, or objects of a store, read by ranges.

mod direct;
mod local;
mod object;

use std::path::PathBuf;
use std::sync::Arc;

use object_store::ObjectStore;

use crate::failure::{Failure, Outcome, code};

pub use direct::DirectReader;
pub use object::ObjectOptions;

/// One region to be.
#[derive(Debug)]
pub struct Item {
    /// Path below the name that the import was given; empty for a single file or object.
    pub name: String,
    /// Bytes.
    pub len: u64,
    /// Changes when the content changes: an interrupted import goes on only where this is the same.
    pub identity: String,
    /// Permission bits of the region.
    pub mode: u32,
    /// Where the bytes are.
    pub origin: Origin,
}

/// Where the bytes of an [`Item`] are.
#[derive(Clone, Debug)]
pub enum Origin {
    /// A local file.
    File(PathBuf),
    /// An object, and the ETag that every range must have.
    Object { store: Arc<dyn ObjectStore>, path: object_store::path::Path, e_tag: Option<String>, url: String },
}

impl Origin {
    /// For messages.
    pub fn describe(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Object { url, .. } => url.clone(),
        }
    }
}

/// Everything that one import brings.
#[derive(Debug)]
pub struct Listing {
    /// True: `NAME` becomes a directory with the items in it.
    pub is_directory: bool,
    /// Directories below `NAME`, parents first; empty ones are kept.
    pub directories: Vec<String>,
    /// The regions, in order of their names.
    pub items: Vec<Item>,
}

impl Listing {
    /// Bytes of all items.
    pub fn len(&self) -> u64 {
        self.items.iter().map(|item| item.len).sum()
    }
}

/// Something that can be listed and streamed.
pub enum Source {
    /// A local file or directory.
    Local(PathBuf),
    /// A URL of a store.
    Object(object::ObjectSource),
}

impl Source {
    /// Recognises `text` as a URL or a local path.
    pub fn parse(text: &str, options: &ObjectOptions) -> Outcome<Self> {
        match text.split_once("://") {
            Some((scheme, _)) if is_scheme(scheme) => object::parse_url(text, options),
            _ => Ok(Self::Local(PathBuf::from(text))),
        }
    }

    /// What there is to import. Reads metadata only.
    pub fn list(&self, recursive: bool) -> Outcome<Listing> {
        match self {
            Self::Local(path) => local::list(path),
            Self::Object(source) => source.list(recursive),
        }
    }

    /// Reads all of `buffer` at `offset` of an item: for headers, before the stream starts.
    pub fn read_at(&self, item: &Item, offset: u64, buffer: &mut [u8]) -> Outcome {
        match (&item.origin, self) {
            (Origin::File(path), _) => local::read_at(path, offset, buffer),
            (origin, Self::Object(source)) => source.read_at(origin, offset, buffer),
            (origin, Self::Local(_)) => {
                unreachable!("a local source lists files only, not {}", origin.describe())
            }
        }
    }

    /// After the stream: all bytes came, and a local file is still the one that was listed.
    pub fn recheck(&self, item: &Item, done: u64) -> Outcome {
        let changed = |what: String| {
            let message = format!("{} changed while it was imported: {what}", item.origin.describe());
            Err(Failure::new(code::FAILED, "Changed", message)
                .hint("import it again when nothing writes to it"))
        };
        if done != item.len {
            return changed(format!("{done} bytes came, {} were expected", item.len));
        }
        match &item.origin {
            Origin::File(path) if local::identity(path)? != item.identity => {
                changed("size or time are others".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// The bytes of an item from `offset` on, in order.
    pub fn stream(&self, item: &Item, offset: u64) -> Outcome<Stream> {
        match (&item.origin, self) {
            (Origin::File(path), _) => {
                Ok(Stream::File(Box::new(DirectReader::open(path, offset, direct::IMPORT_DEPTH)?)))
            }
            (origin, Self::Object(source)) => Ok(Stream::Object(source.stream(origin, offset, item.len))),
            (origin, Self::Local(_)) => {
                unreachable!("a local source lists files only, not {}", origin.describe())
            }
        }
    }
}

/// Bytes in order, with more of them under way.
pub enum Stream {
    /// A local file.
    File(Box<DirectReader>),
    /// An object.
    Object(object::ObjectStream),
}

impl Stream {
    /// Hands the next bytes to `sink`; false at the end. What `sink` returns as an error ends the stream.
    pub fn next(&mut self, sink: &mut dyn FnMut(&[u8]) -> Outcome) -> Outcome<bool> {
        match self {
            Self::File(reader) => match reader.next()? {
                Some(block) => {
                    sink(block.bytes())?;
                    reader.recycle(block);
                    Ok(true)
                }
                None => Ok(false),
            },
            Self::Object(stream) => match stream.next()? {
                Some(bytes) => sink(&bytes).map(|()| true),
                None => Ok(false),
            },
        }
    }
}

/// RFC 3986, section 3.1; a Windows drive or `a:b` is none since `://` must follow.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}
