//! Prometheus text over HTTP, for as long as a pool is owned.
//!
//! A few lines of HTTP are all that a scrape needs: one request a connection, answered from text that is made for it. What
//! asks too much, too slowly or too often is cut off, so that nobody can hold up the owner of a pool.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// A request line and headers are shorter.
const REQUEST_MOST: usize = 8 << 10;
/// From connecting to the last byte.
const DEADLINE: Duration = Duration::from_secs(2);
/// Connections at a time.
const CONNECTIONS: usize = 8;

/// Makes the text; `None` once there is nothing to tell of.
pub type Source = dyn Fn() -> Option<String> + Send + Sync;

/// `9299` is a port of loopback; any other address is given in full. The error says what is wrong, for a person.
pub fn parse_address(text: &str) -> std::result::Result<SocketAddr, String> {
    if let Ok(port) = text.parse() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    text.parse().map_err(|_| {
        "it is neither a port (9299: loopback only) nor an address and a port (127.0.0.1:9299, [::]:9299)"
            .to_owned()
    })
}

/// A bound address that does not answer yet.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
}

impl Bound {
    /// Takes the address, so that one that cannot be had is known before anything else happens. `Busy`: the port is taken; `InvalidArgument`: this
    /// machine has no such address.
    pub fn new(address: SocketAddr) -> Result<Bound> {
        let tried = || format!("serve metrics on {address}");
        let listener = TcpListener::bind(address).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                let context = format!("{}: the port is taken by another mount or program, name another port", tried());
                Error::with_source(ErrorKind::Busy, context, error)
            }
            std::io::ErrorKind::AddrNotAvailable => {
                let context = format!(
                    "{}: this machine has no such address (127.0.0.1 is this machine alone, 0.0.0.0 is all of its addresses)",
                    tried()
                );
                Error::with_source(ErrorKind::InvalidArgument, context, error)
            }
            _ => Error::io(tried(), error),
        })?;
        let address = listener.local_addr().map_err(|error| Error::io(tried(), error))?;
        if !address.ip().is_loopback() {
            tracing::warn!(
                "metrics on {address} are readable by everyone who reaches it: there is no password"
            );
        }
        Ok(Bound { listener, address })
    }

    /// Where it is; a port of 0 has become a real one.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until it is dropped.
    pub fn serve(self, source: Arc<Source>) -> Result<Server> {
        let stop = Arc::new(AtomicBool::new(false));
        let (address, stopped) = (self.address, Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("metrics".into())
            .spawn(move || accept(&self.listener, &source, &stopped))
            .map_err(|error| Error::io("start the thread that serves metrics", error))?;
        Ok(Server { address, stop, thread: Some(thread) })
    }
}

/// Answers scrapes; dropping it ends that.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread out of accept(2). An address that means all of them is reached by loopback.
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() {
                Ipv4Addr::LOCALHOST.into()
            } else {
                std::net::Ipv6Addr::LOCALHOST.into()
            });
        }
        let woken = TcpStream::connect_timeout(&address, DEADLINE).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, source: &Arc<Source>, stop: &AtomicBool) {
    let open = Arc::new(AtomicUsize::new(0));
    while !stop.load(Ordering::SeqCst) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, or a client that left again: neither ends the server, and neither may spin it.
                tracing::debug!("metrics: accept: {error}");
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if stop.load(Ordering::SeqCst) {
            break;
        }
        if open.load(Ordering::SeqCst) >= CONNECTIONS {
            continue;
        }
        open.fetch_add(1, Ordering::SeqCst);
        let (source, ours) = (Arc::clone(source), Arc::clone(&open));
        let started = std::thread::Builder::new().name("metrics-answer".into()).spawn(move || {
            if let Err(error) = answer(stream, &*source) {
                tracing::debug!("metrics: {error}");
            }
            ours.fetch_sub(1, Ordering::SeqCst);
        });
        if started.is_err() {
            open.fetch_sub(1, Ordering::SeqCst);
        }
    }
    // Whoever is being answered holds the pool open until then.
    let start = Instant::now();
    while open.load(Ordering::SeqCst) > 0 && start.elapsed() < 2 * DEADLINE {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn answer(mut stream: TcpStream, source: &Source) -> std::io::Result<()> {
    let start = Instant::now();
    stream.set_write_timeout(Some(DEADLINE))?;
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        let left = DEADLINE.saturating_sub(start.elapsed());
        if left.is_zero() || request.len() > REQUEST_MOST {
            return respond(&mut stream, "400 Bad Request", "", "this is no request for metrics\n");
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part)? {
            0 => return Ok(()),
            count => request.extend_from_slice(&part[..count]),
        }
    }
    let line =
        String::from_utf8_lossy(request.split(|byte| *byte == b'\r').next().unwrap_or_default()).into_owned();
    let mut words = line.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    match (method, path) {
        ("GET" | "HEAD", "/metrics") => match source() {
            Some(text) => {
                let body = if method == "HEAD" { "" } else { &text };
                respond_with(&mut stream, "200 OK", "", text.len(), body)
            }
            None => respond(&mut stream, "503 Service Unavailable", "", "the pool is being closed\n"),
        },
        ("GET" | "HEAD", _) => respond(&mut stream, "404 Not Found", "", "metrics are at /metrics\n"),
        _ => respond(&mut stream, "405 Method Not Allowed", "Allow: GET, HEAD\r\n", "only GET and HEAD\n"),
    }
}

fn respond(stream: &mut TcpStream, status: &str, header: &str, body: &str) -> std::io::Result<()> {
    respond_with(stream, status, header, body.len(), body)
}

fn respond_with(
    stream: &mut TcpStream,
    status: &str,
    header: &str,
    length: usize,
    body: &str,
) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {length}\r\n\
         {header}Connection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    stream.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(parse_address("9299").unwrap().to_string(), "127.0.0.1:9299");
        assert_eq!(parse_address("0.0.0.0:1").unwrap().to_string(), "0.0.0.0:1");
        assert_eq!(parse_address("[::1]:9").unwrap().to_string(), "[::1]:9");
        for wrong in ["", "localhost:9299", "70000", "1.2.3.4", "1.2.3.4:x"] {
            assert!(parse_address(wrong).is_err(), "{wrong}");
        }
    }
}
