//! Objects of a store: s3://, gs://, https:// (and plain http:// for servers that are asked for by name).
//!
//! A stream is a series of range requests, several at a time, handed on in order. Each range asks for the ETag that the
//! listing saw, so an object that is replaced in the middle ends the import instead of mixing two files.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientConfigKey, ClientOptions, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt,
    RetryConfig,
};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use url::Url;

use super::{Item, Listing, Origin, Source};
use crate::failure::{Failure, Outcome, code, describe};
use crate::{interrupt, names};

/// Connections that never come up and answers that never come are errors after this time; a slow one is not.
const CONNECT_TIMEOUT: &str = "10s";
const READ_TIMEOUT: &str = "60s";
/// Of one range request as a whole: 8 MiB at 10 KB/s.
const TIMEOUT: &str = "15min";
const RETRIES: usize = 5;
/// How often a wait looks for SIGINT.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How objects are fetched.
#[derive(Clone, Copy, Debug)]
pub struct ObjectOptions {
    /// Range requests at a time.
    pub connections: usize,
    /// Bytes of one range request.
    pub part_size: u64,
}

/// A store, and the path in it.
pub struct ObjectSource {
    store: Arc<dyn ObjectStore>,
    path: Path,
    url: Url,
    options: ObjectOptions,
    runtime: Arc<Runtime>,
}

/// Makes a source of a URL. `file://` is a local path.
pub fn parse_url(text: &str, options: &ObjectOptions) -> Outcome<Source> {
    let wrong = |why: String| Failure::usage(format!("`{}` cannot be imported: {why}", redacted(text)));
    let url = Url::parse(text).map_err(|error| wrong(error.to_string()))?;
    if url.scheme() == "file" {
        let path = url.to_file_path().map_err(|()| wrong("write file:///absolute/path".to_owned()))?;
        return Ok(Source::Local(path));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("user names and passwords do not belong into URLs".to_owned()));
    }
    if url.fragment().is_some() || url.query().is_some_and(|query| query != "download=true") {
        return Err(wrong("queries and fragments are not supported (signed URLs neither)".to_owned()));
    }
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(3),
            base: 2.0,
        },
        max_retries: RETRIES,
        retry_timeout: Duration::from_secs(120),
    };
    let path = Path::from_url_path(url.path()).map_err(|error| wrong(error.to_string()))?;
    let built: object_store::Result<Arc<dyn ObjectStore>> = match url.scheme() {
        "s3" | "s3a" => AmazonS3Builder::from_env()
            .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::ConnectTimeout), CONNECT_TIMEOUT)
            .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::ReadTimeout), READ_TIMEOUT)
            .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::Timeout), TIMEOUT)
            .with_retry(retry)
            .with_url(url.as_str())
            .build()
            .map(|store| Arc::new(store) as _),
        "gs" => GoogleCloudStorageBuilder::from_env()
            .with_config(GoogleConfigKey::Client(ClientConfigKey::ConnectTimeout), CONNECT_TIMEOUT)
            .with_config(GoogleConfigKey::Client(ClientConfigKey::ReadTimeout), READ_TIMEOUT)
            .with_config(GoogleConfigKey::Client(ClientConfigKey::Timeout), TIMEOUT)
            .with_retry(retry)
            .with_url(url.as_str())
            .build()
            .map(|store| Arc::new(store) as _),
        // Plain http was asked for by name, so it is allowed; S3 and GCS need AWS_ALLOW_HTTP.
        "http" | "https" => HttpBuilder::new()
            .with_client_options(bearer(ClientOptions::new(), &url)?.with_allow_http(url.scheme() == "http"))
            .with_config(ClientConfigKey::ConnectTimeout, CONNECT_TIMEOUT)
            .with_config(ClientConfigKey::ReadTimeout, READ_TIMEOUT)
            .with_config(ClientConfigKey::Timeout, TIMEOUT)
            .with_retry(retry)
            .with_url(&url[..url::Position::BeforePath])
            .build()
            .map(|store| Arc::new(store) as _),
        scheme => {
            return Err(wrong(format!(
                "the scheme `{scheme}` is not known: use s3, gs, https, http or file"
            )));
        }
    };
    let store = built.map_err(|error| failure(format!("open {url}"), &error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::io("start the network threads", &error))?;
    let source = ObjectSource { store, path, url, options: *options, runtime: Arc::new(runtime) };
    Ok(Source::Object(source))
}

/// A URL as it may be shown and logged: without what stands before an `@` or after a `?` or `#`, where passwords, tokens and signatures are.
fn redacted(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let (rest, hidden) = match rest.find(['?', '#']) {
        // Of a password, or of a query? Nobody knows.
        Some(at) if rest[at..].contains('@') => ("", "***"),
        Some(at) => (&rest[..at], "?***"),
        None => (rest, ""),
    };
    // The last one: an `@` or a `/` in a password may have been written as it is.
    let (user, rest) = match rest.rsplit_once('@') {
        Some((_, rest)) => ("***@", rest),
        None => ("", rest),
    };
    format!("{scheme}://{user}{rest}{hidden}")
}

/// A text with its URLs [`redacted`].
fn scrubbed(text: &str) -> String {
    let shown = |word: &str| match word.split_once("://") {
        Some(_) => {
            let end = word.trim_end().len();
            redacted(&word[..end]) + &word[end..]
        }
        None => word.to_owned(),
    };
    text.split_inclusive(char::is_whitespace).map(shown).collect()
}

/// Hugging Face's token goes to Hugging Face only.
fn bearer(client: ClientOptions, url: &Url) -> Outcome<ClientOptions> {
    use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
    let (Some(token), "https", Some("huggingface.co")) = (token, url.scheme(), url.host_str()) else {
        return Ok(client);
    };
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| Failure::usage("HF_TOKEN has characters that no header can have"))?;
    value.set_sensitive(true);
    Ok(client.with_default_headers(HeaderMap::from_iter([(AUTHORIZATION, value)])))
}

impl ObjectSource {
    /// One object, or with `recursive` all below the path.
    pub fn list(&self, recursive: bool) -> Outcome<Listing> {
        if recursive { self.list_prefix() } else { self.list_object() }
    }

    fn list_object(&self) -> Outcome<Listing> {
        if self.path.as_ref().is_empty() {
            return Err(
                Failure::usage(format!("{} names no object", self.url)).hint("add --recursive to import all")
            );
        }
        let meta = self.wait(self.store.head(&self.path)).map_err(|failure| {
            if failure.code == code::NOT_FOUND {
                failure.hint("if it is a prefix, add --recursive")
            } else {
                failure
            }
        })?;
        Ok(Listing {
            is_directory: false,
            directories: Vec::new(),
            items: vec![self.item(String::new(), meta)],
        })
    }

    fn list_prefix(&self) -> Outcome<Listing> {
        let prefix = (!self.path.as_ref().is_empty()).then_some(&self.path);
        let mut found: Vec<ObjectMeta> = self.wait(self.store.list(prefix).try_collect())?;
        found.sort_by(|a, b| a.location.cmp(&b.location));
        let mut listing = Listing { is_directory: true, directories: Vec::new(), items: Vec::new() };
        for meta in found {
            let name = match meta.location.prefix_match(&self.path) {
                Some(parts) => parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/"),
                None => continue,
            };
            // An object named exactly like the prefix, and the empty `dir/` markers that consoles make, are no files.
            if name.is_empty() {
                continue;
            }
            let name = names::normalize_entry(&name)?;
            let parents: Vec<_> = name.match_indices('/').map(|(end, _)| name[..end].to_owned()).collect();
            for parent in parents {
                if !listing.directories.contains(&parent) {
                    listing.directories.push(parent);
                }
            }
            listing.items.push(self.item(name, meta));
        }
        listing.items.retain(|item| !(item.len == 0 && listing.directories.contains(&item.name)));
        if let Some(item) = listing.items.iter().find(|item| listing.directories.contains(&item.name)) {
            let message = format!(
                "{} is an object and a prefix at once, which no file tree can hold",
                item.origin.describe()
            );
            return Err(Failure::failed(message).hint("import the two one by one"));
        }
        if listing.items.is_empty() {
            return Err(Failure::not_found(format!("there are no objects below {}", self.url)));
        }
        Ok(listing)
    }

    fn item(&self, name: String, meta: ObjectMeta) -> Item {
        let mut url = self.url.clone();
        url.set_path(meta.location.as_ref());
        let identity = match &meta.e_tag {
            Some(e_tag) => format!("object:{}:{e_tag}", meta.size),
            None => format!("object:{}:{}", meta.size, meta.last_modified.timestamp_micros()),
        };
        let origin = Origin::Object {
            store: Arc::clone(&self.store),
            path: meta.location,
            e_tag: meta.e_tag,
            url: url.to_string(),
        };
        Item { name, len: meta.size, identity, mode: 0o644, origin }
    }

    /// Reads all of `buffer` at `offset`.
    pub fn read_at(&self, origin: &Origin, offset: u64, buffer: &mut [u8]) -> Outcome {
        let Origin::Object { store, path, e_tag, url } = origin else {
            return Err(Failure::failed(format!("{} is no object", origin.describe())));
        };
        let range = offset..offset + buffer.len() as u64;
        let bytes = match self.wait(get(Arc::clone(store), path.clone(), e_tag.clone(), range.clone())) {
            Err(failure) if failure.code == code::UNSUPPORTED => self.read_from_start(store, path, range)?,
            answer => answer?,
        };
        if bytes.len() != buffer.len() {
            return Err(Failure::failed(format!(
                "{url} ended after {} bytes of {}",
                bytes.len(),
                buffer.len()
            )));
        }
        buffer.copy_from_slice(&bytes);
        Ok(())
    }

    /// For servers without ranges: the object from its start, up to the end of the range. Headers are near the start.
    fn read_from_start(
        &self,
        store: &Arc<dyn ObjectStore>,
        path: &Path,
        range: Range<u64>,
    ) -> Outcome<bytes::Bytes> {
        let (start, end) = (range.start as usize, range.end as usize);
        self.wait(async {
            let mut stream = store.get(path).await?.into_stream();
            let mut found = bytes::BytesMut::new();
            while found.len() < end {
                match stream.try_next().await? {
                    Some(bytes) => found.extend_from_slice(&bytes),
                    None => break,
                }
            }
            found.truncate(end);
            Ok(found.freeze().slice(start.min(end)..))
        })
    }

    /// The bytes from `offset` to `len`, by ranges that do not change from run to run: both ends of a resumed range fit.
    pub fn stream(&self, origin: &Origin, offset: u64, len: u64) -> ObjectStream {
        let ObjectOptions { connections, part_size } = self.options;
        let (sender, receiver) = mpsc::channel(connections);
        if let Origin::Object { store, path, e_tag, url } = origin.clone() {
            let parts = std::iter::successors(Some(offset), move |at| Some((at / part_size + 1) * part_size))
                .take_while(move |at| *at < len)
                .map(move |at| at..((at / part_size + 1) * part_size).min(len));
            self.runtime.spawn(async move {
                let mut first = true;
                let mut answers = futures_util::stream::iter(parts)
                    .map(|range| {
                        let expected = range.end - range.start;
                        let answer = get(Arc::clone(&store), path.clone(), e_tag.clone(), range);
                        async move { answer.await.map(|bytes| (bytes, expected)) }
                    })
                    .buffered(connections);
                while let Some(answer) = answers.next().await {
                    let answer = match answer {
                        // Web servers may know no ranges: they answer with the whole object, which the store refuses.
                        Err(object_store::Error::NotSupported { .. }) if first => {
                            drop(answers);
                            return whole(&store, &path, &url, offset, &sender).await;
                        }
                        Ok((bytes, expected)) if bytes.len() as u64 != expected => Err(Failure::failed(
                            format!("{url}: a range of {expected} bytes was answered with {}", bytes.len()),
                        )),
                        Ok((bytes, _)) => Ok(bytes),
                        Err(error) => Err(failure(format!("read {url}"), &error)),
                    };
                    first = false;
                    let last = answer.is_err();
                    // The receiver is gone when the import was given up.
                    if sender.send(answer).await.is_err() || last {
                        return;
                    }
                }
            });
        }
        ObjectStream { receiver, runtime: Arc::clone(&self.runtime), left: len - offset.min(len) }
    }

    /// Waits for an answer, looking for SIGINT.
    fn wait<T>(&self, answer: impl Future<Output = object_store::Result<T>>) -> Outcome<T> {
        self.runtime.block_on(async {
            let mut answer = std::pin::pin!(answer);
            loop {
                match tokio::time::timeout(POLL_INTERVAL, &mut answer).await {
                    Ok(answer) => {
                        return answer.map_err(|error| failure(format!("read {}", self.url), &error));
                    }
                    Err(_) => interrupt::check()?,
                }
            }
        })
    }
}

async fn get(
    store: Arc<dyn ObjectStore>,
    path: Path,
    e_tag: Option<String>,
    range: Range<u64>,
) -> object_store::Result<bytes::Bytes> {
    // A weak ETag never matches If-Match (RFC 9110, section 13.1.1).
    let if_match = e_tag.filter(|e_tag| !e_tag.starts_with("W/"));
    let options = GetOptions { range: Some(range.into()), if_match, ..GetOptions::default() };
    store.get_opts(&path, options).await?.bytes().await
}

/// The whole object in one answer, without what comes before `offset`.
async fn whole(
    store: &Arc<dyn ObjectStore>,
    path: &Path,
    url: &str,
    offset: u64,
    sender: &mpsc::Sender<Outcome<bytes::Bytes>>,
) {
    let mut stream = match store.get(path).await {
        Ok(answer) => answer.into_stream(),
        Err(error) => {
            let _ = sender.send(Err(failure(format!("read {url}"), &error))).await;
            return;
        }
    };
    let mut before = offset;
    while let Some(answer) = stream.next().await {
        let answer = answer.map_err(|error| failure(format!("read {url}"), &error)).map(|mut bytes| {
            let skipped = before.min(bytes.len() as u64);
            before -= skipped;
            bytes.split_off(skipped as usize)
        });
        let last = answer.is_err();
        // The receiver is gone when the import was given up.
        if sender.send(answer).await.is_err() || last {
            return;
        }
    }
}

/// See [`ObjectSource::stream`].
pub struct ObjectStream {
    receiver: mpsc::Receiver<Outcome<bytes::Bytes>>,
    runtime: Arc<Runtime>,
    left: u64,
}

impl ObjectStream {
    /// The next bytes; `None` at the end.
    pub fn next(&mut self) -> Outcome<Option<bytes::Bytes>> {
        let Self { receiver, runtime, left } = self;
        let answer = runtime.block_on(async {
            loop {
                match tokio::time::timeout(POLL_INTERVAL, receiver.recv()).await {
                    Ok(answer) => return answer.transpose(),
                    Err(_) => interrupt::check()?,
                }
            }
        })?;
        match &answer {
            Some(bytes) => *left = left.saturating_sub(bytes.len() as u64),
            None if *left > 0 => {
                return Err(Failure::failed(format!(
                    "the stream of the object ended {left} bytes too early"
                )));
            }
            None => {}
        }
        Ok(answer)
    }
}

/// Says what a store's error means and what can be done about it.
fn failure(tried: String, error: &object_store::Error) -> Failure {
    use object_store::Error as E;
    // It may name what a server redirected to, signature and all.
    let message = format!("{tried}: {}", scrubbed(&describe(error)));
    match error {
        E::NotFound { .. } => Failure::not_found(message),
        E::Precondition { .. } => Failure::failed(message).hint("the object was replaced meanwhile: start the import again"),
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => Failure::new(code::FAILED, "PermissionDenied", message)
            .hint("check the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN"),
        E::NotSupported { .. } | E::NotImplemented { .. } => Failure::unsupported(message),
        _ => Failure::failed(message).hint(
            "check the address, the network and the credentials (AWS_ENDPOINT_URL, AWS_ALLOW_HTTP, AWS_SKIP_SIGNATURE=true \
             for public buckets), then run the import again: it goes on where it stopped",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: ObjectOptions = ObjectOptions { connections: 2, part_size: 1 << 20 };

    #[test]
    fn urls_that_cannot_work_are_usage_errors() {
        for (text, word) in [
            ("ftp://host/x", "ftp"),
            ("https://user:secret@host/x", "passwords"),
            ("https://host/x?signature=1", "queries"),
            ("https:///", "empty host"),
            ("file://host/x", "file:///"),
        ] {
            let failure = parse_url(text, &OPTIONS).err().unwrap();
            assert_eq!(failure.code, code::USAGE, "{text}: {failure}");
            assert!(failure.message.contains(word), "{text}: {failure}");
        }
    }

    #[test]
    fn refused_urls_are_shown_without_their_secrets() {
        for text in [
            "https://user:s3cret@host/x",
            "https://s3cret@host/x",
            "https://user:s3cret@host:port/x",
            "https://user:a/s3cret@host/x",
            "s3://user:s3cret?@bucket/x",
            "https://host/x?X-Amz-Signature=s3cret",
            "https://host/x?a@b=s3cret",
            "https://host/x#s3cret",
            "ftp://user:s3cret@host/x",
            "file://user:s3cret@host/x",
        ] {
            let failure = parse_url(text, &OPTIONS).err().unwrap();
            assert!(!format!("{failure:?}").contains("s3cret"), "{text}: {failure:?}");
        }
        assert_eq!(redacted("https://u:p@host/models/x?sig=1"), "https://***@host/models/x?***");
        let text =
            "error sending request for url (https://cdn/x?Sig=s3cret,)s3cret): timed out\nsee https://u:p@h/";
        assert_eq!(
            scrubbed(text),
            "error sending request for url (https://cdn/x?*** timed out\nsee https://***@h/"
        );
        assert_eq!(redacted("https://host/models/x"), "https://host/models/x");
    }

    #[test]
    fn file_urls_are_local_paths() {
        let Source::Local(path) = parse_url("file:///a/b%20c", &OPTIONS).unwrap() else {
            panic!("not local")
        };
        assert_eq!(path, std::path::Path::new("/a/b c"));
    }
}
