//! MJPEG over HTTP: `mjpeg://host:8080/stream`, as network cameras, ESP32-CAM boards and mjpg-streamer give it.
//!
//! A small client of HTTP/1.1 (RFC 9112): one request, no redirections, no TLS. The pictures are found by their own markers,
//! and not by the boundaries between the parts, which many cameras declare wrongly.

mod address;
mod body;
mod head;

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use self::address::Address;
use self::body::Body;
use self::head::{Head, MAX_HEAD_BYTES};
use super::recovery::{Connect, Connected, Recovering};
use super::stream::{ByteSource, Bytes, JpegStream};
use super::uri::CameraUri;
use super::{Camera, CameraError, CameraOptions, Fault};

/// Opens a camera on the network.
pub(super) fn open(uri: &CameraUri, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    let address = Address::parse(uri.place()).map_err(|reason| uri.bad(reason))?;
    // A password is not shown.
    let name = format!("mjpeg://{}{}", address.authority(), address.target);
    let server = Server { address, timeout: options.connect_timeout, max_frame_bytes: options.max_frame_bytes };
    Ok(Box::new(Recovering::open(name, server, options)?))
}

struct Server {
    address: Address,
    timeout: Duration,
    max_frame_bytes: usize,
}

impl Connect for Server {
    fn connect(&mut self) -> Result<Connected, Fault> {
        let deadline = Instant::now() + self.timeout;
        let mut stream = self.dial(deadline)?;
        stream.set_write_timeout(Some(self.timeout))?;
        stream.write_all(self.address.request().as_bytes())?;
        let (head, rest) = read_head(&mut stream, deadline)?;
        let what = format!("{} from {}", head.check()?, self.address.authority());
        let mut body = Body::new(head.is_chunked());
        let early = body.decode(&rest);
        let source = Connection { stream, body, early };
        Ok(Connected { link: Box::new(JpegStream::new(source, self.max_frame_bytes)), what, adjusted: Vec::new() })
    }
}

impl Server {
    /// Connects to the first of the host's addresses that answers.
    fn dial(&self, deadline: Instant) -> Result<TcpStream, Fault> {
        let place = (self.address.host.as_str(), self.address.port);
        let addresses = place.to_socket_addrs().map_err(|error| Fault::Missing(error.to_string()))?;
        let mut fault = Fault::Missing("the host has no address".to_owned());
        for address in addresses {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) => return Ok(stream),
                Err(error) => fault = Fault::Missing(format!("{address}: {error}")),
            }
        }
        Err(fault)
    }
}

/// Reads up to the end of the answer's head: the head, and what came behind it.
fn read_head(stream: &mut TcpStream, deadline: Instant) -> Result<(Head, Vec<u8>), Fault> {
    let mut bytes = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match read(stream, left)? {
            Bytes::Some(more) => bytes.extend(more),
            Bytes::Nothing => return Err(Fault::Protocol("the server does not answer".to_owned())),
            Bytes::End => return Err(Fault::Closed),
        }
        if let Some((head, length)) = Head::parse(&bytes).map_err(Fault::Protocol)? {
            return Ok((head, bytes.split_off(length)));
        }
        if bytes.len() > MAX_HEAD_BYTES {
            return Err(Fault::Protocol(format!("the server's answer has a head of more than {MAX_HEAD_BYTES} bytes")));
        }
    }
}

/// Reads what there is within a time.
fn read(stream: &mut TcpStream, wait: Duration) -> Result<Bytes, Fault> {
    // A timeout of zero means none at all to the system.
    stream.set_read_timeout(Some(wait.max(Duration::from_millis(1))))?;
    let mut chunk = vec![0; 64 << 10];
    match stream.read(&mut chunk) {
        Ok(0) => Ok(Bytes::End),
        Ok(length) => {
            chunk.truncate(length);
            Ok(Bytes::Some(chunk))
        }
        Err(error) if is_timeout(&error) => Ok(Bytes::Nothing),
        Err(error) => Err(error.into()),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// The body of an answer that is being received.
struct Connection {
    stream: TcpStream,
    body: Body,
    /// What came together with the head.
    early: Vec<u8>,
}

impl ByteSource for Connection {
    fn receive(&mut self, wait: Duration) -> Result<Bytes, Fault> {
        if !self.early.is_empty() {
            return Ok(Bytes::Some(std::mem::take(&mut self.early)));
        }
        // A live stream does not end; the server went away.
        if self.body.is_complete().map_err(|error| Fault::Protocol(error.to_string()))? {
            return Err(Fault::Closed);
        }
        match read(&mut self.stream, wait)? {
            Bytes::Some(bytes) => Ok(Bytes::Some(self.body.decode(&bytes))),
            Bytes::Nothing => Ok(Bytes::Nothing),
            Bytes::End => Err(Fault::Closed),
        }
    }
}

#[cfg(test)]
mod tests;
