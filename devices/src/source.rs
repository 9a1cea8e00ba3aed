//! Picture sources named by URI: a path, `file://`, a folder, `-` for standard input, or a camera.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

/// File name endings of pictures, in lower case.
const ENDINGS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

/// A picture still to be read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Picture {
    /// A file, which need not exist.
    File(PathBuf),
    /// Standard input.
    Stdin,
    /// The next picture of a camera, named by its URI; see [`camera::open`](crate::camera::open).
    Camera(String),
}

impl Picture {
    /// What output calls it: its path, or `-`.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Stdin => "-".to_owned(),
            Self::Camera(uri) => uri.clone(),
        }
    }
}

/// Why a source cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Neither a place of files nor a kind of camera.
    #[error(
        "{uri}: pictures come from files, folders, standard input and cameras ({}), not from {scheme}://",
        crate::camera::schemes()
    )]
    UnsupportedScheme {
        /// The source as given.
        uri: String,
        /// What stands before `://`.
        scheme: String,
    },
    /// A `file://` source that names another machine.
    #[error("{uri}: this names a file on the machine {host}; only files of this machine can be read")]
    OtherMachine {
        /// The source as given.
        uri: String,
        /// The machine.
        host: String,
    },
    /// A `file://` source with a `%` that two hexadecimal digits do not follow.
    #[error("{uri}: a % must be followed by two hexadecimal digits, as in %20; write %25 for % itself")]
    BadEscape {
        /// The source as given.
        uri: String,
    },
    /// A folder without pictures.
    #[error("{} holds no pictures (JPEG, PNG or WebP; hidden files do not count)", folder.display())]
    EmptyFolder {
        /// The folder.
        folder: PathBuf,
    },
    /// A folder that cannot be listed.
    #[error("cannot read the folder {}: {error}", folder.display())]
    Folder {
        /// The folder, which may lie inside the one asked for.
        folder: PathBuf,
        /// What the system says.
        error: io::Error,
    },
}

/// The pictures that arguments name, in the order of the arguments; those of a folder and the folders inside it sorted by path.
///
/// A file that does not exist is among them, and found out when it is read, so that the others are worked on.
///
/// # Errors
/// A source of a kind that cannot be read, or a folder without pictures.
pub fn pictures(arguments: &[String]) -> Result<Vec<Picture>, SourceError> {
    let mut pictures = Vec::new();
    for argument in arguments {
        match place(argument)? {
            Picture::File(path) if path.is_dir() => {
                let mut files = Vec::new();
                walk(&path, &mut files)?;
                if files.is_empty() {
                    return Err(SourceError::EmptyFolder { folder: path });
                }
                files.sort();
                pictures.extend(files.into_iter().map(Picture::File));
            }
            picture => pictures.push(picture),
        }
    }
    Ok(pictures)
}

/// What one argument names: a file or folder, which need not exist, or standard input. Folders are not walked.
///
/// # Errors
/// A source of a kind that cannot be read.
pub fn place(argument: &str) -> Result<Picture, SourceError> {
    if argument == "-" {
        return Ok(Picture::Stdin);
    }
    match scheme(argument) {
        None => Ok(Picture::File(argument.into())),
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("file") => file(argument, rest).map(Picture::File),
        Some((scheme, _)) if crate::camera::is_scheme(scheme) => Ok(Picture::Camera(argument.to_owned())),
        Some((scheme, _)) => Err(SourceError::UnsupportedScheme { uri: argument.to_owned(), scheme: scheme.to_owned() }),
    }
}

/// What stands before and behind `://`, of an argument that is a URI and not a path.
pub(crate) fn scheme(argument: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = argument.split_once("://")?;
    let is_file = scheme.eq_ignore_ascii_case("file");
    // A path may hold "://" too, as in a folder called "http:".
    (is_file || (is_scheme(scheme) && !Path::new(argument).exists())).then_some((scheme, rest))
}

/// RFC 3986, section 3.1.
fn is_scheme(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(inner)
}

/// The path of a `file://` URI (RFC 8089); `file://a/b` without a leading slash is taken as a relative path where that exists.
fn file(uri: &str, rest: &str) -> Result<PathBuf, SourceError> {
    let path = unescape(rest).ok_or_else(|| SourceError::BadEscape { uri: uri.to_owned() })?;
    if rest.starts_with('/') || path.exists() {
        return Ok(path);
    }
    let (host, local) = rest.split_once('/').unwrap_or((rest, ""));
    if !host.eq_ignore_ascii_case("localhost") {
        return Err(SourceError::OtherMachine { uri: uri.to_owned(), host: host.to_owned() });
    }
    Ok(unescape(&format!("/{local}")).unwrap_or(path))
}

fn unescape(text: &str) -> Option<PathBuf> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            let digit = |byte: u8| char::from(byte).to_digit(16);
            let value = digit(digits[0])? * 16 + digit(digits[1])?;
            bytes.push(u8::try_from(value).ok()?);
            rest = after;
        } else {
            bytes.push(byte);
        }
    }
    path(bytes)
}

#[cfg(unix)]
fn path(bytes: Vec<u8>) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    Some(std::ffi::OsString::from_vec(bytes).into())
}

#[cfg(not(unix))]
fn path(bytes: Vec<u8>) -> Option<PathBuf> {
    String::from_utf8(bytes).ok().map(PathBuf::from)
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), SourceError> {
    let fault = |error| SourceError::Folder { folder: folder.to_owned(), error };
    for entry in std::fs::read_dir(folder).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        // Links to folders are not followed: they may lead in circles.
        if entry.file_type().map_err(fault)?.is_dir() {
            walk(&path, files)?;
        } else if is_picture(&path) && !path.is_dir() {
            files.push(path);
        }
    }
    Ok(())
}

fn is_picture(path: &Path) -> bool {
    let ending = path.extension().map(OsStr::to_ascii_lowercase).unwrap_or_default();
    ENDINGS.iter().any(|known| ending == *known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_argument_is_placed() {
        let file = |path: &str| Ok(Picture::File(path.into()));
        let camera = |uri: &str| Ok(Picture::Camera(uri.to_owned()));
        let cases = [
            ("-", Ok(Picture::Stdin)),
            ("a/b.jpg", file("a/b.jpg")),
            ("/a 100%.jpg", file("/a 100%.jpg")),
            ("file:///a/b%20c.jpg", file("/a/b c.jpg")),
            ("FILE:///%C3%A9t%c3%a9.png", file("/été.png")),
            ("file://localhost/a%25.png", file("/a%.png")),
            ("file:///a%2.jpg", Err("two hexadecimal digits")),
            ("file:///a%g0.jpg", Err("two hexadecimal digits")),
            ("file:///a%+1.jpg", Err("two hexadecimal digits")),
            ("file://elsewhere/a.jpg", Err("the machine elsewhere")),
            ("pipe://-", camera("pipe://-")),
            ("v4l2:///dev/video0", camera("v4l2:///dev/video0")),
            ("RPICAM://0?fps=5", camera("RPICAM://0?fps=5")),
            ("csi://0", camera("csi://0")),
            ("mjpeg://host/path", camera("mjpeg://host/path")),
            ("test://scenes", camera("test://scenes")),
            ("http://host/a.jpg", Err("not from http://")),
            ("https://host/a.jpg", Err("files, folders, standard input and cameras (")),
            // No scheme has a slash in it.
            ("a/b://c.jpg", file("a/b://c.jpg")),
        ];
        for (argument, expected) in cases {
            match (place(argument), expected) {
                (Ok(picture), Ok(expected)) => assert_eq!(picture, expected, "{argument}"),
                (Err(error), Err(part)) => {
                    let said = error.to_string();
                    assert!(said.contains(part) && said.contains(argument), "{said}");
                }
                (found, _) => panic!("{argument}: {found:?}"),
            }
        }
    }

    #[test]
    fn folders_are_walked_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for inner in ["b", "b/deep.er", ".hidden", "empty", "looks.jpg"] {
            std::fs::create_dir(at(inner)).unwrap();
        }
        let wanted = ["a.JPG", "b/deep.er/x.webp", "b/y.Jpeg", "c.png"];
        let others = [".d.jpg", ".hidden/e.jpg", "notes.txt", "jpg", "empty/f.gif"];
        for name in wanted.iter().chain(&others) {
            std::fs::write(at(name), b"").unwrap();
        }
        let arguments = ["missing.jpg", folder.path().to_str().unwrap(), "-"].map(str::to_owned);
        let mut expected = vec![Picture::File("missing.jpg".into())];
        expected.extend(wanted.map(|name| Picture::File(at(name))));
        expected.push(Picture::Stdin);
        assert_eq!(pictures(&arguments).unwrap(), expected);

        let empty = pictures(&[at("empty").display().to_string()]).unwrap_err();
        assert!(matches!(&empty, SourceError::EmptyFolder { folder } if *folder == at("empty")), "{empty}");
        assert!(empty.to_string().contains("holds no pictures"), "{empty}");
    }

    #[cfg(unix)]
    #[test]
    fn links_in_circles_end() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.png");
        std::fs::write(&file, b"").unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join("loop")).unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join("loop.png")).unwrap();
        let found = pictures(&[folder.path().display().to_string()]).unwrap();
        assert_eq!(found, [Picture::File(file)]);
    }

    #[test]
    fn names() {
        assert_eq!(Picture::Stdin.name(), "-");
        assert_eq!(Picture::File("a/b.jpg".into()).name(), "a/b.jpg");
    }
}
