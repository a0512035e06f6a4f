//! What a client receives: a response's head, its chunks, gzip, and the events within.
//!
//! The crates for event streams wrap asynchronous streams of a client of their own; here are
//! thousands of sockets of one loop, so that the lines are split here.

use std::io::Write;

use flate2::write::GzDecoder;

type Result<T> = std::result::Result<T, String>;

/// A head or a chunk's size that is longer is none.
const LONGEST_HEAD: usize = 16 << 10;

/// One event, or what only moves the client's place: an id without data.
pub struct Event<'a> {
    /// The id that it brings itself.
    pub id: Option<&'a [u8]>,
    pub kind: &'a [u8],
    pub data: &'a [u8],
}

/// One response, fed with bytes in any split.
#[derive(Default)]
pub struct Response {
    /// Bytes of a head or of a chunk's size that is not whole yet.
    partial: Vec<u8>,
    part: Part,
    gzip: Option<GzDecoder<Vec<u8>>>,
    lines: Lines,
}

/// What comes next.
#[derive(Clone, Copy, Default, PartialEq)]
enum Part {
    #[default]
    Head,
    Size,
    Chunk(u64),
    /// Bytes of the line end behind a chunk.
    ChunkEnd(u8),
    Plain,
    Over,
}

impl Response {
    /// Whether its head is there.
    pub fn has_begun(&self) -> bool {
        self.part != Part::Head
    }

    /// Whether its body came to its end, and was not broken off.
    pub fn is_over(&self) -> bool {
        self.part == Part::Over
    }

    /// Milliseconds after which the server wants to see the client again, if it has said so.
    pub fn retry(&self) -> Option<u64> {
        self.lines.retry
    }

    /// Takes what was read, and hands on the events that are whole with it.
    pub fn take(&mut self, mut bytes: &[u8], each: &mut dyn FnMut(Event)) -> Result<()> {
        while !bytes.is_empty() {
            bytes = match self.part {
                Part::Head => self.head(bytes)?,
                Part::Size => self.size(bytes)?,
                Part::Chunk(left) => {
                    let (chunk, rest) = bytes.split_at(bytes.len().min(left as usize));
                    self.body(chunk, each)?;
                    let left = left - chunk.len() as u64;
                    self.part = if left > 0 { Part::Chunk(left) } else { Part::ChunkEnd(2) };
                    rest
                }
                Part::ChunkEnd(left) => {
                    if bytes[0] != if left == 2 { b'\r' } else { b'\n' } {
                        return Err("a chunk that is longer than it says".into());
                    }
                    self.part = if left > 1 { Part::ChunkEnd(left - 1) } else { Part::Size };
                    &bytes[1..]
                }
                Part::Plain => {
                    self.body(bytes, each)?;
                    &[]
                }
                // The line end behind the last chunk.
                Part::Over => &[],
            };
        }
        Ok(())
    }

    fn head<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8]> {
        let had = self.partial.len();
        self.partial.extend_from_slice(bytes);
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Response::new(&mut headers);
        let status = head.parse(&self.partial).map_err(|error| format!("the head: {error}"))?;
        let httparse::Status::Complete(length) = status else {
            if self.partial.len() > LONGEST_HEAD {
                return Err("a head without end".into());
            }
            return Ok(&[]);
        };
        if head.code != Some(200) {
            return Err(format!("answer {}", head.code.unwrap_or(0)));
        }
        let is = |name: &str, value: &[u8]| {
            let mut named = head.headers.iter().filter(|each| each.name.eq_ignore_ascii_case(name));
            named.any(|each| each.value.eq_ignore_ascii_case(value))
        };
        self.part = if is("Transfer-Encoding", b"chunked") { Part::Size } else { Part::Plain };
        self.gzip = is("Content-Encoding", b"gzip").then(|| GzDecoder::new(Vec::new()));
        self.partial.clear();
        Ok(&bytes[length - had..])
    }

    fn size<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8]> {
        let end = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1);
        self.partial.extend_from_slice(&bytes[..end]);
        match httparse::parse_chunk_size(&self.partial) {
            Ok(httparse::Status::Complete((_, size))) => {
                self.part = if size > 0 { Part::Chunk(size) } else { Part::Over };
                self.partial.clear();
            }
            Ok(httparse::Status::Partial) if self.partial.len() < LONGEST_HEAD => {}
            _ => return Err("no size of a chunk".into()),
        }
        Ok(&bytes[end..])
    }

    fn body(&mut self, bytes: &[u8], each: &mut dyn FnMut(Event)) -> Result<()> {
        let Some(gzip) = &mut self.gzip else {
            self.lines.take(bytes, each);
            return Ok(());
        };
        // Flushed, or what is whole would wait for more in the decoder.
        gzip.write_all(bytes).and_then(|()| gzip.flush()).map_err(|error| error.to_string())?;
        self.lines.take(gzip.get_ref(), each);
        gzip.get_mut().clear();
        Ok(())
    }
}

/// The fields of an event stream, line by line.
#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
    id: Option<Vec<u8>>,
    kind: Vec<u8>,
    data: Vec<u8>,
    retry: Option<u64>,
}

impl Lines {
    fn take(&mut self, mut bytes: &[u8], each: &mut dyn FnMut(Event)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = bytes.split_at(end);
            bytes = &rest[1..];
            if self.partial.is_empty() {
                self.line(line, each);
            } else {
                let mut whole = std::mem::take(&mut self.partial);
                whole.extend_from_slice(line);
                self.line(&whole, each);
            }
        }
        self.partial.extend_from_slice(bytes);
    }

    fn line(&mut self, line: &[u8], each: &mut dyn FnMut(Event)) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            let data = self.data.strip_suffix(b"\n").unwrap_or(&self.data);
            if self.id.is_some() || !data.is_empty() {
                each(Event { id: self.id.as_deref(), kind: &self.kind, data });
            }
            self.id = None;
            self.kind.clear();
            self.data.clear();
            return;
        }
        let at = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let (name, value) = line.split_at(at);
        let value = value.strip_prefix(b":").unwrap_or(value);
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match name {
            b"id" => self.id = Some(value.to_vec()),
            b"event" => self.kind = value.to_vec(),
            b"data" => {
                self.data.extend_from_slice(value);
                self.data.push(b'\n');
            }
            b"retry" => {
                self.retry = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
            }
            // A comment, or a field that nobody knows.
            _ => {}
        }
    }
}
