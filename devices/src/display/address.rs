//! Display URIs: `scheme://path?key=value&…`.

use std::path::{Path, PathBuf};

use super::DisplayError;

/// A display URI, taken apart. Options are asked for one by one; [`Address::finish`] complains of those that nobody asked for.
pub(super) struct Address<'a> {
    uri: &'a str,
    scheme: String,
    path: &'a str,
    options: Vec<(&'a str, &'a str)>,
}

impl<'a> Address<'a> {
    pub(super) fn parse(uri: &'a str) -> Result<Self, DisplayError> {
        let fault = |reason: String| DisplayError::Address { uri: uri.to_owned(), reason };
        let (scheme, rest) = uri.split_once("://").unwrap_or((uri, ""));
        let (path, options) = rest.split_once('?').unwrap_or((rest, ""));
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let Some((key, value)) = option.split_once('=') else {
                return Err(fault(format!("{option}: options are written key=value")));
            };
            if pairs.iter().any(|(known, _)| *known == key) {
                return Err(fault(format!("{key} is said twice")));
            }
            pairs.push((key, value));
        }
        Ok(Self { uri, scheme: scheme.to_ascii_lowercase(), path, options: pairs })
    }

    pub(super) fn scheme(&self) -> &str {
        &self.scheme
    }

    /// The path, or what it is where none is said.
    pub(super) fn path_or(&self, default: &str) -> PathBuf {
        Path::new(if self.path.is_empty() { default } else { self.path }).to_path_buf()
    }

    pub(super) fn fault(&self, reason: String) -> DisplayError {
        DisplayError::Address { uri: self.uri.to_owned(), reason }
    }

    /// Takes an option; `meaning` says what would be right where `parse` gives nothing.
    pub(super) fn option<T>(
        &mut self,
        key: &str,
        meaning: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, DisplayError> {
        let Some(at) = self.options.iter().position(|(known, _)| *known == key) else {
            return Ok(None);
        };
        let (_, value) = self.options.remove(at);
        parse(value).map(Some).ok_or_else(|| self.fault(format!("{key}={value}: say {meaning}")))
    }

    /// Takes a whole number, which may be written in hexadecimal.
    pub(super) fn number<T: TryFrom<u32>>(&mut self, key: &str, meaning: &str) -> Result<Option<T>, DisplayError> {
        self.option(key, meaning, |text| {
            let number = match text.strip_prefix("0x") {
                Some(digits) => u32::from_str_radix(digits, 16),
                None => text.parse(),
            };
            number.ok().and_then(|number| number.try_into().ok())
        })
    }

    /// Takes `on` or `off`.
    pub(super) fn switch(&mut self, key: &str) -> Result<Option<bool>, DisplayError> {
        self.option(key, "on or off", |text| match text {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        })
    }

    /// Takes `size=WxH`, both from 1 to 8192.
    pub(super) fn size(&mut self) -> Result<Option<(u32, u32)>, DisplayError> {
        self.option("size", "width and height in pixels, as in 320x240", |text| {
            let (width, height) = pair(text, 'x')?;
            ((1..=8192).contains(&width) && (1..=8192).contains(&height)).then_some((width, height))
        })
    }

    /// Refuses options that nobody has taken.
    pub(super) fn finish(&self) -> Result<(), DisplayError> {
        match self.options.first() {
            Some((key, _)) => Err(self.fault(format!("{key} is no option of {}://", self.scheme))),
            None => Ok(()),
        }
    }
}

/// Two whole numbers with a character between them.
pub(super) fn pair(text: &str, between: char) -> Option<(u32, u32)> {
    let (first, second) = text.split_once(between)?;
    Some((first.parse().ok()?, second.parse().ok()?))
}
