//! The address of a network camera: `[user:password@]host[:port][/path]`.

/// Where a stream is, and who asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    /// Name or number, without the brackets of IPv6.
    pub(super) host: String,
    pub(super) port: u16,
    /// Path and query, which begin with a slash.
    pub(super) target: String,
    /// User and password, in Base64, as basic authentication has them.
    credentials: Option<String>,
}

impl Address {
    /// Takes an address apart.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(super) fn parse(place: &str) -> Result<Self, String> {
        let place = place.split('#').next().unwrap_or_default();
        let end = place.find(['/', '?']).unwrap_or(place.len());
        let (authority, target) = place.split_at(end);
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let (host, port) = match host.strip_prefix('[') {
            Some(host) => {
                let (host, port) = host.split_once(']').ok_or("a [ without its ]")?;
                (host, port.strip_prefix(':').or(port.is_empty().then_some("80")).ok_or("no port behind ]")?)
            }
            None => host.split_once(':').unwrap_or((host, "80")),
        };
        let port = port.parse().map_err(|_| format!("{port} is no port: it must be a number from 0 to 65535"))?;
        let is_plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if host.is_empty() || !is_plain(host) {
            return Err("it must name a host, as in mjpeg://camera.local:8080/stream".to_owned());
        }
        // Spaces and line breaks would end the request's line.
        if !is_plain(target) {
            return Err("a path must be of printable ASCII without spaces: write %20 and the like".to_owned());
        }
        let slash = if target.starts_with('/') { "" } else { "/" };
        let credentials = user.map(|user| unescape(user).map(|bytes| base64(&bytes))).transpose()?;
        Ok(Self { host: host.to_owned(), port, target: format!("{slash}{target}"), credentials })
    }

    /// Host and port, as a URI has them.
    pub(super) fn authority(&self) -> String {
        let (open, close) = if self.host.contains(':') { ("[", "]") } else { ("", "") };
        let port = if self.port == 80 { String::new() } else { format!(":{}", self.port) };
        format!("{open}{}{close}{port}", self.host)
    }

    /// The request for the stream.
    pub(super) fn request(&self) -> String {
        let credentials = self.credentials.as_ref().map(|both| format!("Authorization: Basic {both}\r\n")).unwrap_or_default();
        format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: unimo/{}\r\nAccept: multipart/x-mixed-replace, image/jpeg\r\n{credentials}\
             Connection: close\r\n\r\n",
            self.target,
            self.authority(),
            env!("CARGO_PKG_VERSION"),
        )
    }
}

/// Bytes of a text in which `%` and two digits stand for one.
fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = rest.split_at_checked(2).and_then(|(digits, after)| {
            rest = after;
            let digit = |byte: u8| char::from(byte).to_digit(16);
            Some(digit(digits[0])? * 16 + digit(digits[1])?)
        });
        bytes.push(digits.and_then(|value| u8::try_from(value).ok()).ok_or("a % must be followed by two hexadecimal digits")?);
    }
    Ok(bytes)
}

/// Base64 with padding (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().enumerate().fold(0u32, |bits, (index, byte)| bits | (u32::from(*byte) << (16 - 8 * index)));
        for index in 0..4 {
            let digit = ALPHABET[(bits >> (18 - 6 * index) & 63) as usize];
            text.push(if index <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let cases = [
            ("camera.local", "camera.local", 80, "/", "camera.local"),
            ("192.168.1.9:81/stream", "192.168.1.9", 81, "/stream", "192.168.1.9:81"),
            ("host/?action=stream&x=1#top", "host", 80, "/?action=stream&x=1", "host"),
            ("host?action=stream", "host", 80, "/?action=stream", "host"),
            ("[::1]:8080/a@b:c", "::1", 8080, "/a@b:c", "[::1]:8080"),
            ("[fe80::1]", "fe80::1", 80, "/", "[fe80::1]"),
            ("me:p%40ss@host:80/x", "host", 80, "/x", "host"),
        ];
        for (place, host, port, target, authority) in cases {
            let address = Address::parse(place).unwrap();
            let found = (address.host.as_str(), address.port, address.target.as_str());
            assert_eq!(found, (host, port, target), "{place}");
            assert_eq!(address.authority(), authority);
        }
        for (place, part) in [
            ("", "must name a host"),
            (":80/x", "must name a host"),
            ("host:camera/x", "camera is no port"),
            ("host:99999", "99999 is no port"),
            ("[::1", "without its ]"),
            ("[::1]80", "no port behind ]"),
            ("host/a b", "printable ASCII"),
            ("host/a\r\nHost: other", "printable ASCII"),
            ("ho st/a", "must name a host"),
            ("me%4@host", "two hexadecimal digits"),
        ] {
            let error = Address::parse(place).unwrap_err();
            assert!(error.contains(part), "{place}: {error}");
        }
    }

    #[test]
    fn requests() {
        let request = Address::parse("me:p%40ss@host:81/a?b").unwrap().request();
        assert!(request.starts_with("GET /a?b HTTP/1.1\r\nHost: host:81\r\n"), "{request}");
        // printf 'me:p@ss' | base64
        assert!(request.contains("\r\nAuthorization: Basic bWU6cEBzcw==\r\n") && request.ends_with("\r\n\r\n"), "{request}");
        assert!(!Address::parse("host").unwrap().request().contains("Authorization"));
    }

    #[test]
    fn base64_of_rfc_4648() {
        let cases = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (text, expected) in cases {
            assert_eq!(base64(text.as_bytes()), expected);
        }
        assert_eq!(base64(&[0xFB, 0xFF, 0xBF]), "+/+/");
    }
}
