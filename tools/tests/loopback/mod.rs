//! Servers on loopback: a web server with ranges, and a relay in front of any server. Both can stop answering at a point
//! that the test chooses, so that an interrupted import is the same in every run.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use nvtier_tests::wait_for;

/// What a web server serves and what it was asked.
#[derive(Default)]
struct Site {
    files: Mutex<HashMap<String, (Vec<u8>, String)>>,
    /// First and last byte of each range request.
    ranges: Mutex<Vec<(u64, u64)>>,
    /// Ranges that start here or later get no answer.
    stall_at: AtomicU64,
    stalled: AtomicBool,
    /// Connections that wait at the stall.
    waiting: Mutex<Vec<TcpStream>>,
    /// Ranges are ignored: the whole file is the answer.
    no_ranges: AtomicBool,
}

/// A web server; ends with the test program.
pub struct WebServer {
    site: Arc<Site>,
    address: SocketAddr,
}

impl WebServer {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let site = Arc::new(Site { stall_at: AtomicU64::new(u64::MAX), ..Site::default() });
        let shared = Arc::clone(&site);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let site = Arc::clone(&shared);
                // A client that goes away ends its thread: that is what the tests provoke.
                thread::spawn(move || drop(serve(&site, stream)));
            }
        });
        Self { site, address }
    }

    pub fn put(&self, path: &str, bytes: &[u8], e_tag: &str) {
        self.site.files.lock().unwrap().insert(path.to_owned(), (bytes.to_vec(), e_tag.to_owned()));
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn stall_at(&self, offset: u64) {
        self.site.stalled.store(false, Ordering::SeqCst);
        self.site.stall_at.store(offset, Ordering::SeqCst);
    }

    pub fn ignore_ranges(&self) {
        self.site.no_ranges.store(true, Ordering::SeqCst);
    }

    /// Waits until a range was left without answer.
    pub fn wait_for_stall(&self) {
        wait_for(|| self.site.stalled.load(Ordering::SeqCst).then_some(()))
            .expect("a request for a late range");
    }

    /// Breaks the connections that wait and answers everything from now on.
    pub fn break_stalled(&self) {
        self.site.stall_at.store(u64::MAX, Ordering::SeqCst);
        for stream in self.site.waiting.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Ranges asked for since the last call.
    pub fn take_ranges(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.site.ranges.lock().unwrap())
    }
}

fn serve(site: &Site, stream: TcpStream) -> std::io::Result<()> {
    let mut out = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split(' ');
        let (method, path) = (words.next().unwrap_or("").to_owned(), words.next().unwrap_or("").to_owned());
        let mut headers = HashMap::new();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            match header.trim_end().split_once(':') {
                Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_owned()),
                None => break,
            };
        }
        let file = site.files.lock().unwrap().get(&path).cloned();
        let Some((bytes, e_tag)) = file else {
            write!(out, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        };
        if headers.get("if-match").is_some_and(|wanted| *wanted != e_tag) {
            write!(out, "HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        }
        let common = format!(
            "ETag: {e_tag}\r\nLast-Modified: Tue, 24 Nov 2026 01:37:00 GMT\r\nAccept-Ranges: bytes\r\n"
        );
        if method == "HEAD" {
            write!(out, "HTTP/1.1 200 OK\r\n{common}Content-Length: {}\r\n\r\n", bytes.len())?;
            continue;
        }
        let range = headers.get("range").and_then(|range| {
            let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?.min(bytes.len() as u64 - 1)))
        });
        match range {
            Some((first, last)) if !site.no_ranges.load(Ordering::SeqCst) => {
                if first >= site.stall_at.load(Ordering::SeqCst) {
                    site.waiting.lock().unwrap().push(out.try_clone()?);
                    site.stalled.store(true, Ordering::SeqCst);
                    // Until the client goes away, or the test breaks the connection.
                    let _ = reader.read(&mut [0]);
                    return Ok(());
                }
                site.ranges.lock().unwrap().push((first, last));
                let part = &bytes[first as usize..=last as usize];
                write!(
                    out,
                    "HTTP/1.1 206 Partial Content\r\n{common}Content-Range: bytes {first}-{last}/{}\r\nContent-Length: {}\r\n\r\n",
                    bytes.len(),
                    part.len()
                )?;
                out.write_all(part)?;
            }
            _ => {
                write!(out, "HTTP/1.1 200 OK\r\n{common}Content-Length: {}\r\n\r\n", bytes.len())?;
                out.write_all(&bytes)?;
            }
        }
    }
}

/// Hands bytes on to a server, and stops after so many bytes of answers.
pub struct Relay {
    address: SocketAddr,
    stalled: Arc<AtomicBool>,
}

impl Relay {
    pub fn start(server: SocketAddr, stop_after: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stalled = Arc::new(AtomicBool::new(false));
        let (seen, flag) = (Arc::new(AtomicU64::new(0)), Arc::clone(&stalled));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(upstream) = TcpStream::connect(server) else { continue };
                let (from, to) = (client.try_clone().unwrap(), upstream.try_clone().unwrap());
                thread::spawn(move || copy(from, to, &AtomicU64::new(0), u64::MAX, &AtomicBool::new(false)));
                let (seen, flag) = (Arc::clone(&seen), Arc::clone(&flag));
                thread::spawn(move || copy(upstream, client, &seen, stop_after, &flag));
            }
        });
        Self { address, stalled }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn wait_for_stall(&self) {
        wait_for(|| self.stalled.load(Ordering::SeqCst).then_some(())).expect("that many bytes of answers");
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, seen: &AtomicU64, stop_after: u64, stalled: &AtomicBool) {
    let mut buffer = [0; 16 << 10];
    while let Ok(count) = from.read(&mut buffer) {
        if count == 0 {
            break;
        }
        if seen.fetch_add(count as u64, Ordering::SeqCst) + count as u64 > stop_after {
            stalled.store(true, Ordering::SeqCst);
            // The client waits for the rest until it is ended.
            let _ = to.read(&mut buffer);
            break;
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
