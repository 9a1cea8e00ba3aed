//! Exit codes, and the one sentence that an error becomes.

use std::io;
use std::process::ExitCode;

use unimo::bundle::{BundleError, PackError};
use unimo::engine::EngineError;
use unimo::model::ModelError;
use unimo_devices::camera::CameraError;
use unimo_devices::source::SourceError;

use super::pictures::PictureError;

/// Nothing was found: no picture in a folder, no match in a gallery.
pub const NOTHING_FOUND: u8 = 1;
/// The command line asks for what cannot be.
pub const USAGE: u8 = 2;
/// A picture, a text or a bundle is bad; also where some of several are.
pub const BAD_INPUT: u8 = 3;
/// A device or camera is not available.
pub const NO_DEVICE: u8 = 4;
/// The engine or its provider is not available.
pub const NO_ENGINE: u8 = 5;
/// A budget of time that was asked for was missed.
pub const BUDGET_MISSED: u8 = 6;
/// A signal ended it before its end.
#[cfg(all(unix, feature = "watch"))]
pub const INTERRUPTED: u8 = 130;

/// What `--help` says about exit codes.
pub const HELP: &str = "\
Exit codes:
  0  done
  1  nothing found
  2  wrong usage
  3  bad input or bundle (of several pictures, those that can be read are still worked on)
  4  device or camera not available
  5  engine not available
  6  a budget was missed
130  interrupted";

/// A wish that the command line's grammar allows and its meaning does not.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// The exit code of a command's result; an error is told on standard error.
pub fn code(result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        // Whoever reads our output has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", sentence(&error));
            ExitCode::from(code_of(&error))
        }
    }
}

/// An error and its causes, each said once: most messages of the libraries already hold their cause's.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut sentence = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !sentence.contains(&cause) {
            if !sentence.is_empty() {
                sentence.push_str(": ");
            }
            sentence.push_str(&cause);
        }
    }
    sentence
}

/// The exit code for an error. Whatever is not known better is bad input.
pub fn code_of(error: &anyhow::Error) -> u8 {
    error
        .chain()
        .find_map(|cause| {
            if cause.is::<UsageError>() {
                Some(USAGE)
            } else if let Some(error) = cause.downcast_ref::<PictureError>() {
                Some(picture_code(error))
            } else if let Some(error) = cause.downcast_ref::<CameraError>() {
                Some(camera_code(error))
            } else if let Some(error) = cause.downcast_ref::<SourceError>() {
                Some(source_code(error))
            } else if let Some(error) = cause.downcast_ref::<ModelError>() {
                Some(model_code(error))
            } else if let Some(error) = cause.downcast_ref::<EngineError>() {
                Some(engine_code(error))
            } else if let Some(code) = device_code(cause) {
                Some(code)
            } else if cause.is::<BundleError>() || cause.is::<PackError>() {
                Some(BAD_INPUT)
            } else {
                None
            }
        })
        .unwrap_or(BAD_INPUT)
}

/// The exit code for a picture that could not be had.
pub fn picture_code(error: &PictureError) -> u8 {
    match error {
        PictureError::Image(_) => BAD_INPUT,
        PictureError::Camera(error) => camera_code(error),
        PictureError::NoPicture(_) => NO_DEVICE,
    }
}

fn source_code(error: &SourceError) -> u8 {
    match error {
        SourceError::UnsupportedScheme { .. } | SourceError::OtherMachine { .. } | SourceError::BadEscape { .. } => USAGE,
        SourceError::EmptyFolder { .. } => NOTHING_FOUND,
        SourceError::Folder { .. } => BAD_INPUT,
    }
}

fn camera_code(error: &CameraError) -> u8 {
    match error {
        CameraError::BadUri { .. } | CameraError::UnknownScheme { .. } => USAGE,
        CameraError::Source(error) => source_code(error),
        CameraError::Fault { .. } | CameraError::Timeout { .. } => NO_DEVICE,
    }
}

/// The exit code for an error of a display or a serial line, if it is one.
#[cfg(all(unix, feature = "watch"))]
fn device_code(error: &(dyn std::error::Error + 'static)) -> Option<u8> {
    use unimo_devices::display::DisplayError;
    use unimo_devices::serial::SerialError;
    match error.downcast_ref::<DisplayError>() {
        Some(DisplayError::Address { .. }) => Some(USAGE),
        Some(_) => Some(NO_DEVICE),
        None => error.is::<SerialError>().then_some(NO_DEVICE),
    }
}

#[cfg(not(all(unix, feature = "watch")))]
fn device_code(_: &(dyn std::error::Error + 'static)) -> Option<u8> {
    None
}

fn model_code(error: &ModelError) -> u8 {
    match error {
        ModelError::Bundle(_) => BAD_INPUT,
        ModelError::Engine(error) => engine_code(error),
        ModelError::TooManyWords { .. } => USAGE,
    }
}

fn engine_code(error: &EngineError) -> u8 {
    match error {
        EngineError::NotBuilt(_)
        | EngineError::Library { .. }
        | EngineError::Provider { .. }
        | EngineError::Form { .. }
        | EngineError::Threads { .. } => NO_ENGINE,
        // The rest are faults of the graphs that the bundle brought.
        _ => BAD_INPUT,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let is_pipe = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(is_pipe))
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use unimo::engine::{EngineKind, EngineOptions};
    use unimo_devices::camera::Fault;

    use super::*;

    #[test]
    fn codes() {
        let library = Some("/nowhere".into());
        let ort = EngineOptions { engine: EngineKind::Ort, library, ..EngineOptions::default() };
        let not_there = || unimo::engine::open(&ort).err().map(anyhow::Error::new);
        let model = |error: EngineError| anyhow::Error::new(ModelError::Engine(error));
        let load = EngineError::Load { graph: "text".to_owned(), reason: "odd".to_owned() };
        let cases = [
            (not_there(), NO_ENGINE),
            (unimo::engine::open(&ort).err().map(model), NO_ENGINE),
            (not_there().map(|error| error.context("opening")), NO_ENGINE),
            (Some(model(load)), BAD_INPUT),
            (Some(ModelError::TooManyWords { asked: 99, most: 31 }.into()), USAGE),
            (Some(UsageError("no".to_owned()).into()), USAGE),
            (Some(CameraError::Fault { camera: "c".to_owned(), fault: Fault::Busy }.into()), NO_DEVICE),
            (Some(CameraError::BadUri { uri: "c".to_owned(), reason: "odd".to_owned() }.into()), USAGE),
            (Some(SourceError::EmptyFolder { folder: "x".into() }.into()), NOTHING_FOUND),
            (Some(anyhow::anyhow!("what else")), BAD_INPUT),
        ];
        for (error, expected) in cases {
            let code = error.as_ref().map(code_of);
            assert_eq!(code, Some(expected), "{error:?}");
        }
    }

    #[test]
    fn a_cause_is_said_once() {
        let cause = io::Error::other("disk on fire");
        let error = Err::<(), _>(cause).context("cannot read x: disk on fire").context("while indexing");
        let said = error.map_err(|error| sentence(&error));
        assert_eq!(said, Err("while indexing: cannot read x: disk on fire".to_owned()));
    }
}
