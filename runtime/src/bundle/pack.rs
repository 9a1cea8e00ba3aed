//! Writing a bundle as one `.tar` file.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::{Bundle, BundleError, MANIFEST};

/// Why a bundle could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The bundle itself is at fault.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The archive cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The archive.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Verifies a bundle and writes it as an uncompressed `.tar`: the manifest first, then the files by name, without times or
/// owners, so that equal bundles give equal archives. The file appears under its name only when it is complete and on disk.
///
/// # Errors
/// Where [`Bundle::verify`] finds a fault or the archive cannot be written.
pub fn pack(bundle: &Bundle, out: &Path) -> Result<(), PackError> {
    bundle.verify()?;
    write_archive(bundle, out)
}

pub(super) fn write_archive(bundle: &Bundle, out: &Path) -> Result<(), PackError> {
    let mut part = out.as_os_str().to_owned();
    part.push(".tmp");
    let part = PathBuf::from(part);
    let written = members(bundle).and_then(|members| {
        write(&part, &members)
            .and_then(|()| std::fs::rename(&part, out))
            .map_err(|source| PackError::Write { path: out.to_path_buf(), source })
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    written
}

fn members(bundle: &Bundle) -> Result<Vec<(&str, &[u8])>, PackError> {
    let mut members = vec![(MANIFEST, bundle.files.get(MANIFEST).unwrap_or_default())];
    for file in bundle.manifest.files.keys() {
        members.push((file, bundle.read(file)?));
    }
    Ok(members)
}

fn write(path: &Path, members: &[(&str, &[u8])]) -> io::Result<()> {
    let mut archive = tar::Builder::new(BufWriter::new(File::create(path)?));
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        archive.append_data(&mut header, name, *bytes)?;
    }
    let mut writer = archive.into_inner()?;
    writer.flush()?;
    writer.get_ref().sync_all()
}
