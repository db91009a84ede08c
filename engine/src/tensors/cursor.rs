//! A forward reader over `read_at` with one small window, so that a header of any claimed length costs little memory.

use super::{Failure, MalformedKind, Parse, ReadAt, malformed};

const WINDOW: usize = 256 << 10;

pub(super) struct Cursor<'a, 'b> {
    read_at: &'a mut ReadAt<'b>,
    /// Bytes the reader may touch: the file's size or the header limit, whichever is less.
    end: u64,
    position: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<'a, 'b> Cursor<'a, 'b> {
    pub fn new(end: u64, read_at: &'a mut ReadAt<'b>) -> Self {
        Cursor { read_at, end, position: 0, window: Vec::new(), window_at: 0 }
    }

    pub fn position(&self) -> u64 {
        self.position
    }

    pub fn remaining(&self) -> u64 {
        self.end - self.position
    }

    fn need(&self, len: u64, what: &str) -> Parse<()> {
        if len > self.remaining() {
            return malformed(
                MalformedKind::Truncated,
                format!(
                    "{what} needs {len} bytes at offset {}, but only {} are left",
                    self.position,
                    self.remaining()
                ),
            );
        }
        Ok(())
    }

    /// Passes over `len` bytes without reading them.
    pub fn skip(&mut self, len: u64, what: &str) -> Parse<()> {
        self.need(len, what)?;
        self.position += len;
        Ok(())
    }

    fn fill(&mut self, out: &mut [u8]) -> Parse<()> {
        let mut done = 0;
        while done < out.len() {
            let window_end = self.window_at + self.window.len() as u64;
            if self.position < self.window_at || self.position >= window_end {
                let len = self.remaining().min(WINDOW as u64) as usize;
                self.window.resize(len, 0);
                self.window_at = self.position;
                (self.read_at)(self.position, &mut self.window).map_err(Failure::Read)?;
            }
            let from = (self.position - self.window_at) as usize;
            let n = (self.window.len() - from).min(out.len() - done);
            out[done..done + n].copy_from_slice(&self.window[from..from + n]);
            done += n;
            self.position += n as u64;
        }
        Ok(())
    }

    pub fn array<const N: usize>(&mut self, what: &str) -> Parse<[u8; N]> {
        self.need(N as u64, what)?;
        let mut out = [0; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    pub fn u16(&mut self, what: &str) -> Parse<u16> {
        Ok(u16::from_le_bytes(self.array(what)?))
    }

    pub fn u32(&mut self, what: &str) -> Parse<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: &str) -> Parse<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// `len` bytes; the caller has bounded `len`, and it is checked against what is left before memory is taken.
    pub fn bytes(&mut self, len: u64, what: &str) -> Parse<Vec<u8>> {
        self.need(len, what)?;
        let mut out = vec![0; len as usize];
        self.fill(&mut out)?;
        Ok(out)
    }
}
