//! Messages to a program on the other end of a serial line or pipe, in the frames of [`unimo_wire`].

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::termios::{OptionalActions, isatty, tcgetattr, tcsetattr};
use unimo_wire::{MAX_FRAME, Message, encode};

/// Why a serial line cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// It cannot be opened.
    #[error("the serial line {} is not available: {source}", path.display())]
    Unavailable {
        /// The device or pipe.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It cannot have this speed.
    #[error("the serial line {} cannot be set to {baud} baud: {source}", path.display())]
    Baud {
        /// The device.
        path: PathBuf,
        /// The speed asked for.
        baud: u32,
        /// The system's reason.
        source: io::Error,
    },
    /// It was there, and cannot be written.
    #[error("cannot write to the serial line {}: {source}", path.display())]
    Write {
        /// The device or pipe.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// An open serial line. Writing never waits: a message that finds no room, because nobody reads, is lost whole and counted.
pub struct SerialLine {
    path: PathBuf,
    file: File,
    lost: u64,
    /// Part of a frame is on the line, which a zero byte must end.
    torn: bool,
}

impl SerialLine {
    /// Opens a serial device, which is set to 8 bits, no parity and `baud`, or a pipe or file, which is written as it is.
    ///
    /// # Errors
    /// One that is not there, cannot be written, or cannot have the speed.
    pub fn open(path: &Path, baud: u32) -> Result<Self, SerialError> {
        let unavailable = |source| SerialError::Unavailable { path: path.to_path_buf(), source };
        // Reading too: a pipe can then be opened before anybody reads it. Never the controlling terminal.
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let mut options = File::options();
        options.read(true).append(true).custom_flags(flags.bits().cast_signed());
        let file = options.open(path).map_err(unavailable)?;
        if isatty(&file) {
            let set = |baud| {
                let mut attributes = tcgetattr(&file)?;
                attributes.make_raw();
                attributes.set_speed(baud)?;
                tcsetattr(&file, OptionalActions::Now, &attributes)
            };
            set(baud).map_err(|error| SerialError::Baud { path: path.to_path_buf(), baud, source: error.into() })?;
        }
        // The line may hold the rest of a frame, or what a boot loader said.
        Ok(Self { path: path.to_path_buf(), file, lost: 0, torn: true })
    }

    /// Sends a message, or loses it.
    ///
    /// # Errors
    /// A device that was unplugged.
    pub fn send(&mut self, message: &Message<'_>) -> Result<(), SerialError> {
        let mut buffer = [0; 1 + MAX_FRAME];
        let error = |source| SerialError::Write { path: self.path.clone(), source };
        let length = encode(message, &mut buffer[1..]).map_err(|too_long| error(io::Error::other(too_long)))?.len();
        // The first byte of the buffer is the zero that ends what was torn.
        let bytes = if self.torn { &buffer[..=length] } else { &buffer[1..=length] };
        match write_now(&mut self.file, bytes) {
            Ok(written) => {
                self.lost += u64::from(written < bytes.len());
                self.torn = if written == 0 { self.torn } else { written < bytes.len() };
                Ok(())
            }
            Err(source) => Err(error(source)),
        }
    }

    /// Messages lost so far because nobody read them.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

/// Writes what there is room for; gives how much that was.
fn write_now(file: &mut File, bytes: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => break,
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use unimo_wire::{Caption, Decoder, Hello};

    use super::*;

    fn caption(sequence: u64) -> Message<'static> {
        Message::Caption(Caption { sequence, captured_ms: 10, latency_ms: 132, score: -0.5, text: "a \u{11}\u{13} dog" })
    }

    /// Sequences of the captions in what was sent, and the number of bad frames.
    fn read(bytes: &[u8]) -> (Vec<u64>, usize) {
        let (mut decoder, mut sequences, mut bad) = (Decoder::new(), Vec::new(), 0);
        for &byte in bytes {
            match decoder.push(byte) {
                Some(Ok(Message::Caption(caption))) => sequences.push(caption.sequence),
                Some(Ok(_)) | None => {}
                Some(Err(_)) => bad += 1,
            }
        }
        (sequences, bad)
    }

    #[test]
    fn a_terminal_is_set_to_raw_bytes() {
        let host = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&host).unwrap();
        unlockpt(&host).unwrap();
        let name = ptsname(&host, Vec::new()).unwrap().into_string().unwrap();
        let mut line = SerialLine::open(Path::new(&name), 57_600).unwrap();
        let attributes = tcgetattr(&line.file).unwrap();
        assert_eq!((attributes.output_speed(), attributes.input_speed()), (57_600, 57_600));

        // Flow-control characters, line feeds and zeros pass as they are.
        line.send(&Message::Hello(Hello { program: "0", source: "\n\r" })).unwrap();
        line.send(&caption(10)).unwrap();
        let mut bytes = [0; 256];
        let mut host = File::from(host);
        let mut length = 0;
        while read(&bytes[..length]).0.is_empty() {
            length += host.read(&mut bytes[length..]).unwrap();
        }
        assert_eq!((bytes[0], read(&bytes[..length])), (0, (vec![10], 0)));

        // No terminal has this speed; a pseudo-terminal takes any that the system can express.
        let said = SerialLine::open(Path::new(&name), 0xFFFF_FFFF).map(drop);
        assert!(said.is_ok() || said.is_err_and(|error| error.to_string().contains("4294967295 baud")));
    }

    #[test]
    fn a_pipe_that_nobody_reads_loses_whole_messages() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("captions");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let mut line = SerialLine::open(&path, 9600).unwrap();
        let mut sent = 0;
        while line.lost() < 3 {
            line.send(&caption(sent)).unwrap();
            sent += 1;
        }
        // What was in the pipe is read, and captions go on behind it.
        let mut reader = File::options().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(&path).unwrap();
        let mut bytes = vec![0; 1 << 20];
        let mut length = 0;
        while let Ok(more) = reader.read(&mut bytes[length..]) {
            length += more;
        }
        line.send(&caption(999_999)).unwrap();
        length += reader.read(&mut bytes[length..]).unwrap();
        let (sequences, bad) = read(&bytes[..length]);
        let expected: Vec<u64> = (0..sent - 3).chain([999_999]).collect();
        assert!(sequences == expected, "{} of {}", sequences.len(), expected.len());
        assert!(bad <= 1, "at most the frame that was cut is bad: {bad}");
    }

    #[test]
    fn files_are_appended_to_and_must_exist() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"boot").unwrap();
        for sequence in [1, 2] {
            SerialLine::open(file.path(), 115_200).unwrap().send(&caption(sequence)).unwrap();
        }
        assert_eq!(read(&std::fs::read(file.path()).unwrap()), (vec![1, 2], 1));

        let said = SerialLine::open(Path::new("/nowhere/ttyUSB0"), 9600).err().unwrap().to_string();
        assert!(said.contains("the serial line /nowhere/ttyUSB0 is not available: No such file"), "{said}");
        let mut full = SerialLine::open(Path::new("/dev/full"), 9600).unwrap();
        let said = full.send(&caption(1)).unwrap_err().to_string();
        assert!(said.contains("cannot write to the serial line /dev/full: No space left"), "{said}");
    }
}
