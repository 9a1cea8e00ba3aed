//! Camera URIs: `scheme://place?wish=value&…`.

use std::time::Duration;

use super::{CameraError, CameraOptions};
use crate::source;

/// A camera URI taken apart; wishes are taken out one by one, and those that nobody took are refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CameraUri {
    given: String,
    scheme: String,
    place: String,
    wishes: Vec<(String, String)>,
}

impl CameraUri {
    /// Takes an argument apart. Plain paths are of the scheme `file`, `-` is `pipe://-`.
    pub(super) fn parse(given: &str) -> Result<Self, CameraError> {
        let (scheme, rest) = match source::scheme(given) {
            Some((scheme, rest)) => (scheme.to_ascii_lowercase(), rest),
            None if given == "-" => ("pipe".to_owned(), given),
            None => ("file".to_owned(), given),
        };
        let mut uri = Self { given: given.to_owned(), scheme, place: rest.to_owned(), wishes: Vec::new() };
        // The query of an address is its server's, and a file may have a question mark in its name.
        if uri.scheme == "mjpeg" || (uri.scheme == "file" && std::path::Path::new(rest).exists()) {
            return Ok(uri);
        }
        if let Some((place, query)) = rest.split_once('?') {
            uri.place = place.to_owned();
            for wish in query.split('&').filter(|wish| !wish.is_empty()) {
                let (key, value) = wish.split_once('=').unwrap_or((wish, "1"));
                if uri.wishes.iter().any(|(known, _)| known == key) {
                    return Err(uri.bad(format!("{key} is given twice")));
                }
                uri.wishes.push((key.to_owned(), value.to_owned()));
            }
        }
        Ok(uri)
    }

    pub(super) fn scheme(&self) -> &str {
        &self.scheme
    }

    pub(super) fn given(&self) -> &str {
        &self.given
    }

    /// What stands between `://` and `?`.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// The argument without its wishes: what output calls the camera.
    pub(super) fn name(&self) -> String {
        match self.given.split_once('?') {
            Some((name, _)) if !self.given.ends_with(&self.place) => name.to_owned(),
            _ => self.given.clone(),
        }
    }

    /// The error for this URI.
    pub(super) fn bad(&self, reason: impl Into<String>) -> CameraError {
        CameraError::BadUri { uri: self.given.clone(), reason: reason.into() }
    }

    /// The value of a wish, which is then fulfilled.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let index = self.wishes.iter().position(|(known, _)| known == key)?;
        Some(self.wishes.remove(index).1)
    }

    /// A wish that is a number.
    pub(super) fn take_number<N: std::str::FromStr>(&mut self, key: &str) -> Result<Option<N>, CameraError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        value.parse().map(Some).map_err(|_| self.bad(format!("{key}={value}: not a number it can be")))
    }

    /// A wish that is `1` or `0`; absent is `0`.
    pub(super) fn take_switch(&mut self, key: &str) -> Result<bool, CameraError> {
        match self.take(key).as_deref() {
            None | Some("0") => Ok(false),
            Some("1") => Ok(true),
            Some(value) => Err(self.bad(format!("{key}={value}: must be 1 or 0"))),
        }
    }

    /// A wish that is a time: `500ms`, `1.5s`, `2m`, or seconds without a unit.
    pub(super) fn take_time(&mut self, key: &str) -> Result<Option<Duration>, CameraError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let units = [("ms", 1e-3), ("s", 1.0), ("m", 60.0)];
        let (digits, unit) =
            units.iter().find_map(|(end, unit)| Some((value.strip_suffix(end)?, *unit))).unwrap_or((&value, 1.0));
        let time = digits.parse::<f64>().ok().and_then(|number| Duration::try_from_secs_f64(number * unit).ok());
        time.map(Some).ok_or_else(|| self.bad(format!("{key}={value}: not a time such as 500ms, 2s or 1m")))
    }

    /// A wish for a size: `640x480`.
    pub(super) fn take_size(&mut self) -> Result<Option<(u32, u32)>, CameraError> {
        let Some(value) = self.take("size") else { return Ok(None) };
        let size = value.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
        match size {
            Some((1..=16384, 1..=16384)) => Ok(size),
            _ => Err(self.bad(format!("size={value}: not a size such as 640x480"))),
        }
    }

    /// The options, with the size and rate that the URI wishes in their place.
    pub(super) fn wishes(&mut self, options: &CameraOptions) -> Result<CameraOptions, CameraError> {
        let mut options = options.clone();
        options.size = self.take_size()?.or(options.size);
        if let Some(fps) = self.take_number::<f32>("fps")? {
            if !(fps.is_finite() && fps > 0.0) {
                return Err(self.bad(format!("fps={fps}: must be more than 0")));
            }
            options.fps = Some(fps);
        }
        Ok(options)
    }

    /// Refuses wishes that nobody took.
    pub(super) fn finish(&self) -> Result<(), CameraError> {
        match self.wishes.first() {
            Some((key, _)) => Err(self.bad(format!("{}:// does not know the wish {key}", self.scheme))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(given: &str) -> CameraUri {
        CameraUri::parse(given).unwrap()
    }

    #[test]
    fn uris_are_taken_apart() {
        let folder = tempfile::tempdir().unwrap();
        let odd = folder.path().join("what?.jpg");
        std::fs::write(&odd, b"").unwrap();
        let odd = odd.to_str().unwrap();
        let cases = [
            ("v4l2:///dev/video0?size=640x480&fps=15", "v4l2", "/dev/video0", "v4l2:///dev/video0", 2),
            ("RPICAM://1", "rpicam", "1", "RPICAM://1", 0),
            ("mjpeg://host:81/stream?a=b", "mjpeg", "host:81/stream?a=b", "mjpeg://host:81/stream?a=b", 0),
            ("pipe://-?format=rgb&size=2x2", "pipe", "-", "pipe://-", 2),
            ("-", "pipe", "-", "-", 0),
            ("no/such/folder?loop", "file", "no/such/folder", "no/such/folder", 1),
            (odd, "file", odd, odd, 0),
            ("file:///a/b?every=2s", "file", "/a/b", "file:///a/b", 1),
            ("test://scenes?", "test", "scenes", "test://scenes", 0),
        ];
        for (given, scheme, place, name, wishes) in cases {
            let uri = parse(given);
            assert_eq!((uri.scheme(), uri.place(), uri.name().as_str()), (scheme, place, name), "{given}");
            assert_eq!(uri.wishes.len(), wishes, "{given}");
        }
        let twice = CameraUri::parse("test://scenes?seed=1&seed=2").unwrap_err().to_string();
        assert!(twice.contains("seed is given twice"), "{twice}");
    }

    #[test]
    fn wishes_are_typed() {
        let mut uri = parse("test://scenes?every=1.5s&loop=1&seed=7&size=64x48&fps=2.5&what=ever");
        assert_eq!(uri.take_time("every").unwrap(), Some(Duration::from_millis(1500)));
        assert!(uri.take_switch("loop").unwrap() && !uri.take_switch("loop").unwrap());
        assert_eq!(uri.take_number::<u64>("seed").unwrap(), Some(7));
        let options = uri.wishes(&CameraOptions { size: Some((1, 1)), ..CameraOptions::default() }).unwrap();
        assert_eq!((options.size, options.fps), (Some((64, 48)), Some(2.5)));
        // What is not wished in the URI stays as it was.
        let wished = CameraOptions { size: Some((1, 1)), fps: Some(9.0), ..CameraOptions::default() };
        let options = parse("test://scenes?seed=7").wishes(&wished).unwrap();
        assert_eq!((options.size, options.fps), (Some((1, 1)), Some(9.0)));
        let left = uri.finish().unwrap_err().to_string();
        assert!(left.contains("does not know the wish what"), "{left}");

        for (wish, time) in [("500ms", 500), ("2", 2000), ("1m", 60_000), ("0.25", 250)] {
            assert_eq!(parse(&format!("x?t={wish}")).take_time("t").unwrap(), Some(Duration::from_millis(time)), "{wish}");
        }
        for wish in ["", "-1s", "1h", "NaN", "s", "1e30"] {
            let error = parse(&format!("x?t={wish}")).take_time("t").unwrap_err().to_string();
            assert!(error.contains(&format!("t={wish}")), "{error}");
        }
        for wish in ["640", "0x480", "640x", "99999x1", "-1x5", "640x480x3"] {
            assert!(parse(&format!("x?size={wish}")).take_size().is_err(), "{wish}");
        }
        for wish in ["0", "-3", "inf", "NaN", "fast"] {
            assert!(parse(&format!("x?fps={wish}")).wishes(&CameraOptions::default()).is_err(), "{wish}");
        }
    }
}
