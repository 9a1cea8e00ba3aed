//! The head of an HTTP answer.

use super::Fault;

/// Longest head that is read.
pub(super) const MAX_HEAD_BYTES: usize = 16 << 10;

/// Status and headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    status: u16,
    reason: String,
    /// Names in lower case.
    headers: Vec<(String, String)>,
}

impl Head {
    /// The head at the start of `bytes` and its length; `None` where it has not come to its end.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, String> {
        if !bytes.starts_with(&b"HTTP/1."[..bytes.len().min(7)]) {
            return Err("the server does not speak HTTP".to_owned());
        }
        // Lines end in CR LF, or, on some cameras, in LF alone.
        let mut lines = Vec::new();
        let mut start = 0;
        let end = loop {
            let Some(length) = bytes[start..].iter().position(|byte| *byte == b'\n') else { return Ok(None) };
            let line = String::from_utf8_lossy(&bytes[start..start + length]).trim_end().to_owned();
            start += length + 1;
            if line.is_empty() {
                break start;
            }
            lines.push(line);
        };
        let status = lines.first().map(String::as_str).unwrap_or_default();
        let mut words = status.splitn(3, ' ').skip(1);
        let code = words.next().filter(|code| code.len() == 3).and_then(|code| code.parse().ok());
        let code = code.ok_or_else(|| format!("the server's answer begins with \"{}\"", status.escape_debug()))?;
        let reason: String = words.next().unwrap_or_default().chars().take(100).collect();
        let header = |line: &String| {
            let (name, value) = line.split_once(':')?;
            Some((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
        };
        Ok(Some((Self { status: code, reason, headers: lines.iter().skip(1).filter_map(header).collect() }, end)))
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Whether the body comes in chunks.
    pub(super) fn is_chunked(&self) -> bool {
        self.header("transfer-encoding").is_some_and(|value| value.to_ascii_lowercase().ends_with("chunked"))
    }

    /// The content type, where it is a stream of pictures.
    pub(super) fn check(&self) -> Result<String, Fault> {
        if self.status != 200 {
            let hint = match self.status {
                401 => ": it wants a user and password, as in mjpeg://user:password@host/…",
                301 | 302 | 307 | 308 => ": the stream is at another address",
                _ => "",
            };
            let other = self.header("location").filter(|_| self.status / 100 == 3);
            let other = other.map(|place| format!(", {}", place.escape_debug())).unwrap_or_default();
            return Err(Fault::Refused(format!("{} {}{hint}{other}", self.status, self.reason.escape_debug())));
        }
        let kind = self.header("content-type").unwrap_or_default();
        let main = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match main.as_str() {
            "multipart/x-mixed-replace" | "multipart/mixed" | "video/x-motion-jpeg" | "video/x-jpeg" | "video/mjpeg" => Ok(main),
            "image/jpeg" => Err(Fault::Refused("with a single picture, and not with a stream of them".to_owned())),
            _ => Err(Fault::Refused(format!("with \"{}\", and not with a stream of pictures", main.escape_debug()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace;boundary=--frame\r\nTRANSFER-Encoding: Chunked\r\n\r\n--frame";

    #[test]
    fn a_head_is_found_wherever_it_is_cut() {
        let length = ANSWER.len() - "--frame".len();
        for cut in 0..length {
            assert_eq!(Head::parse(&ANSWER.as_bytes()[..cut]), Ok(None), "{cut}");
        }
        for text in [ANSWER.to_owned(), ANSWER.replace("\r\n", "\n")] {
            let (head, length) = Head::parse(text.as_bytes()).unwrap().unwrap();
            assert_eq!(&text[length..], "--frame");
            assert!(head.is_chunked());
            assert_eq!(head.check().unwrap(), "multipart/x-mixed-replace");
        }
    }

    #[test]
    fn answers_that_are_no_stream() {
        let cases = [
            ("404 Not Found", "Content-Type: multipart/x-mixed-replace", "the server answered 404 Not Found"),
            ("401 No", "X: y", "it wants a user and password"),
            ("302 Found", "Location: http://other/x", "at another address, http://other/x"),
            ("200 OK", "Content-Type: text/html; charset=utf-8", "with \"text/html\", and not with a stream"),
            ("200 OK", "Content-Type: image/jpeg", "a single picture"),
            ("200 OK", "X: y", "with \"\", and not"),
        ];
        for (status, header, part) in cases {
            let text = format!("HTTP/1.0 {status}\r\n{header}\r\n\r\n");
            let error = Head::parse(text.as_bytes()).unwrap().unwrap().0.check().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        for text in ["SSH-2.0-OpenSSH", "HTTP/2 200", "HTTQ", "\r\n"] {
            assert_eq!(Head::parse(text.as_bytes()), Err("the server does not speak HTTP".to_owned()), "{text}");
        }
        assert!(Head::parse(b"HTTP/1.1 ok\r\n\r\n").unwrap_err().contains("begins with"));
    }
}
