//! Captions in words.

use std::io::Write;

use super::{Bad, Sink, SinkError, rfc3339};
use crate::watch::Captioned;

/// A line a caption: the time and the caption of a camera's frame, the name and the caption of a file.
pub struct Terminal<W> {
    output: W,
    complaints: Box<dyn Write + Send>,
}

impl<W: Write + Send> Terminal<W> {
    /// Captions go to `output`, files that cannot be read are told of on `complaints`.
    pub fn new(output: W, complaints: impl Write + Send + 'static) -> Self {
        Self { output, complaints: Box::new(complaints) }
    }
}

impl<W: Write + Send> Sink for Terminal<W> {
    fn captioned(&mut self, captioned: &Captioned) -> Result<(), SinkError> {
        let caption = &captioned.caption.text;
        if captioned.live {
            writeln!(self.output, "{}  {caption}", rfc3339(captioned.captured))?;
        } else {
            writeln!(self.output, "{}: {caption}", captioned.source)?;
        }
        Ok(self.output.flush()?)
    }

    fn bad(&mut self, bad: &Bad) -> Result<(), SinkError> {
        // Nowhere is left to complain of complaints that fail.
        let _ = writeln!(self.complaints, "error: {}: {}", bad.source, bad.error);
        Ok(())
    }
}
