//! A camera on the network that stalls, closes, garbles and comes back: a server on this machine that follows a script.

use std::net::{SocketAddr, TcpListener};
use std::thread::JoinHandle;

use super::super::samples::{self, Record};
use super::super::{Camera, CameraStats, FrameData};
use super::*;

const SOON: Duration = Duration::from_secs(20);
const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace;boundary=frame\r\n\r\n";
const CHUNKED: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace;boundary=frame\r\nTransfer-Encoding: chunked\r\n\r\n";

/// What the server does with one connection: bytes that it writes, and how long it then stays silent before it closes.
type Act = (Vec<u8>, Duration);

/// Serves the acts, one connection each, and gives the requests that came.
fn serve(acts: Vec<Act>) -> (SocketAddr, JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = move || {
        let act = |(bytes, silence): Act| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            // The camera may have closed already.
            let _ = stream.write_all(&bytes);
            std::thread::sleep(silence);
            String::from_utf8(request).unwrap()
        };
        acts.into_iter().map(act).collect()
    };
    (address, std::thread::spawn(serve))
}

fn camera(address: SocketAddr, options: &CameraOptions) -> Result<Box<dyn Camera>, CameraError> {
    super::super::open(&format!("mjpeg://me:secret@{address}/stream?x=1"), options)
}

fn quick(record: &Record) -> CameraOptions {
    CameraOptions {
        first_retry: Duration::from_millis(1),
        stall_after: Duration::from_millis(100),
        max_frame_bytes: 1000,
        ..record.options()
    }
}

/// A part of the stream, with its boundary and headers.
fn part(jpeg: &[u8]) -> Vec<u8> {
    let head = format!("\r\n--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n", jpeg.len());
    [head.as_bytes(), jpeg].concat()
}

fn chunk(bytes: &[u8]) -> Vec<u8> {
    [format!("{:X}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

#[test]
fn pictures_of_a_server_that_stalls_closes_and_garbles() {
    let jpeg = |tag| samples::jpeg(8, 6, tag);
    let acts = vec![
        // Closes within a picture.
        ([HEAD, &part(&jpeg(1)), &part(&jpeg(2)[..40])].concat(), Duration::ZERO),
        // Stays silent, far longer than it may.
        ([HEAD, &part(&jpeg(3))].concat(), Duration::from_millis(400)),
        // Is overloaded for a while.
        (b"HTTP/1.1 503 Busy\r\n\r\n".to_vec(), Duration::ZERO),
        // Speaks chunked, with pictures across its chunks, a damaged one, and nonsense in the end.
        (
            [
                CHUNKED,
                &part(&jpeg(4)).chunks(7).flat_map(chunk).collect::<Vec<_>>(),
                &chunk(&part(&jpeg(5)[..40])),
                &chunk(&part(&jpeg(6))),
                b"what?",
            ]
            .concat(),
            Duration::ZERO,
        ),
        // Ends its body in good order, which a camera never does.
        ([CHUNKED, &chunk(&part(&jpeg(7))), b"0\r\n\r\n"].concat(), Duration::ZERO),
        ([HEAD, &part(&jpeg(8))].concat(), Duration::from_millis(300)),
    ];
    let (address, server) = serve(acts);
    let record = Record::default();
    let mut camera = camera(address, &quick(&record)).unwrap();
    for (sequence, tag) in [1, 3, 4, 6, 7, 8].into_iter().enumerate() {
        let frame = camera.next(SOON).unwrap().unwrap();
        assert_eq!((frame.sequence, frame.data), (sequence as u64, FrameData::Jpeg(jpeg(tag))), "{:?}", record.lines());
        assert_eq!((frame.width, frame.height), (8, 6));
        assert_eq!(frame.source, format!("mjpeg://{address}/stream?x=1"));
    }
    let CameraStats { frames, corrupt, reconnects, stalls, skipped } = camera.stats();
    assert_eq!((frames, reconnects, stalls, skipped), (6, 4, 1, 0), "{:?}", record.lines());
    assert!(corrupt >= 1);
    for part in
        ["the server closed the connection; next attempt", "silent for 0.1 s", "503 Busy", "begins with no size", "open again"]
    {
        assert!(record.count(part) >= 1, "{part}: {:?}", record.lines());
    }
    assert!(record.lines().iter().all(|line| !line.contains("secret")), "{:?}", record.lines());
    drop(camera);
    let requests = server.join().unwrap();
    assert!(requests.iter().all(|request| request.starts_with("GET /stream?x=1 HTTP/1.1\r\n")), "{requests:?}");
}

#[test]
fn a_server_that_is_not_there_or_gives_no_stream_is_an_error() {
    let cases = [
        ("HTTP/1.1 404 Not Found\r\n\r\n", "the server answered 404 Not Found"),
        ("SSH-2.0-x\r\n", "does not speak HTTP"),
        ("", "the server closed the connection"),
    ];
    for (answer, part) in cases {
        let (address, server) = serve(vec![(answer.as_bytes().to_vec(), Duration::ZERO)]);
        let error = camera(address, &CameraOptions::default()).err().unwrap();
        assert!(error.to_string().contains(part) && !error.to_string().contains("secret"), "{error}");
        server.join().unwrap();
    }
    let head = [b"HTTP/1.1 200 OK\r\nX: ".as_slice(), &vec![b'x'; MAX_HEAD_BYTES]].concat();
    let (address, server) = serve(vec![(head, Duration::from_millis(50))]);
    let error = camera(address, &CameraOptions::default()).err().unwrap().to_string();
    assert!(error.contains("a head of more than 16384 bytes"), "{error}");
    server.join().unwrap();

    // One that listens and says nothing, or half of a head.
    for beginning in [&b""[..], b"HTTP/1.1 200"] {
        let (address, server) = serve(vec![(beginning.to_vec(), Duration::from_millis(400))]);
        let options = CameraOptions { connect_timeout: Duration::from_millis(60), ..CameraOptions::default() };
        let begun = Instant::now();
        let error = camera(address, &options).err().unwrap().to_string();
        assert!(error.ends_with("the server does not answer"), "{error}");
        assert!(begun.elapsed() >= Duration::from_millis(60), "{:?}", begun.elapsed());
        server.join().unwrap();
    }

    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = camera(nobody, &CameraOptions::default()).err().unwrap().to_string();
    assert!(error.starts_with(&format!("mjpeg://{nobody}/stream?x=1: not there: ")), "{error}");
}

#[test]
fn a_server_that_comes_later_is_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let record = Record::default();
    let options = CameraOptions { wait_for_camera: true, ..quick(&record) };
    let mut camera = camera(address, &options).unwrap();
    assert!(camera.next(Duration::from_millis(30)).unwrap_err().is_timeout());
    let listener = TcpListener::bind(address).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[HEAD, &part(&samples::jpeg(8, 6, 1))].concat()).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    });
    assert!(camera.next(SOON).unwrap().is_some());
    assert_eq!(camera.stats().reconnects, 0);
    assert!(
        record.count("not there: ") >= 1 && record.count("open, multipart/x-mixed-replace from") == 1,
        "{:?}",
        record.lines()
    );
    server.join().unwrap();
}
