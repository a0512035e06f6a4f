//! Where the store lies: a directory of this user and this project alone.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, Mode, OFlags, access, fstat, open, statvfs};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::error::{Error, Result};

/// What a file system in memory must hold at the least to be used: what containers are given.
const SMALLEST_SHM: u64 = 64 << 20;

/// The longest path of the directory in bytes: what is left of a socket's address (108 bytes, 104
/// on macOS) for a socket's name.
const LONGEST: usize = 76;

/// Bytes of events in one store at the most, whatever its channels are allowed.
const LARGEST_STORE: u64 = 256 << 20;

/// The directory that every process of `project` and this user chooses, whatever its environment.
pub fn default_path(project: &str) -> PathBuf {
    let shm = Path::new("/dev/shm");
    let base = if is_usable_shm(shm) { shm } else { Path::new("/tmp") };
    base.join(format!("sse_channel-{}", geteuid().as_raw()))
        .join(format!("{:016x}", fingerprint(project.as_bytes())))
}

/// By its size and not by what is free: that changes, and the choice must not.
fn is_usable_shm(path: &Path) -> bool {
    let Ok(size) = statvfs(path) else { return false };
    let is_large = size.f_blocks.saturating_mul(size.f_frsize) >= SMALLEST_SHM;
    is_large && access(path, Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

/// FNV-1a with 64 bits: short, and the same in every build.
pub fn fingerprint(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Makes the directory if need be, and makes sure that it is this user's alone and fit for a store.
///
/// # Errors
/// `Bus` with what is wrong and what to do.
pub fn prepare(path: &Path) -> Result<()> {
    if path.as_os_str().len() > LONGEST {
        return Err(Error::Bus(format!(
            "the directory {} has a path of more than {LONGEST} bytes, too long for the sockets in \
             it; name a shorter one: BUS = \"local:///a/directory\"",
            path.display()
        )));
    }
    let above = path.parent().filter(|above| above.ends_with(own_name()));
    if above.is_none() {
        // The user's own choice: what lies above it is theirs.
        if let Some(above) = path.parent() {
            make(above, true).map_err(|error| refused(path, &error))?;
        }
    }
    for directory in above.into_iter().chain([path]) {
        make(directory, false).map_err(|error| refused(directory, &error))?;
        check(directory)?;
    }
    Ok(())
}

fn own_name() -> String {
    format!("sse_channel-{}", geteuid().as_raw())
}

fn make(path: &Path, with_parents: bool) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).recursive(with_parents).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

fn refused(path: &Path, error: &io::Error) -> Error {
    Error::Bus(format!(
        "the directory {} cannot be used for the store of events: {error}; make it writable for \
         this user, or name another one: BUS = \"local:///a/directory\"",
        path.display()
    ))
}

fn check(path: &Path) -> Result<()> {
    let shown = path.display();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match open(path, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::LOOP | Errno::NOTDIR) => {
            return Err(Error::Bus(format!(
                "{shown} is a symbolic link or no directory; the store of events must lie in a \
                 directory itself: remove the link, or name what it points to"
            )));
        }
        Err(errno @ Errno::ACCESS) => {
            // Another user's, as a rule: then that is what to say.
            check_owner(path, &rustix::fs::stat(path).map_err(|_| refused(path, &errno.into()))?)?;
            return Err(refused(path, &errno.into()));
        }
        Err(errno) => return Err(refused(path, &errno.into())),
    };
    let found = fstat(&directory).map_err(|errno| refused(path, &errno.into()))?;
    check_owner(path, &found)?;
    let mode = found.st_mode & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Error::Bus(format!(
            "the directory {shown} is open to other users (mode {mode:o}), who could read and \
             send events: chmod 700 {shown}"
        )));
    }
    if let Some(kind) = network_file_system(&directory) {
        return Err(Error::Bus(format!(
            "the directory {shown} is on a network file system ({kind}), on which processes of \
             several hosts cannot share a store; name a local directory, or use redis:// for \
             several hosts"
        )));
    }
    access(path, Access::WRITE_OK | Access::EXEC_OK).map_err(|errno| refused(path, &errno.into()))
}

fn check_owner(path: &Path, found: &rustix::fs::Stat) -> Result<()> {
    let me = geteuid().as_raw();
    if found.st_uid == me {
        return Ok(());
    }
    let shown = path.display();
    Err(Error::Bus(format!(
        "the directory {shown} belongs to the user {}, and this process runs as the user {me}: run \
         all processes of the project as one user, or use redis://",
        found.st_uid
    )))
}

#[cfg(target_os = "linux")]
fn network_file_system(directory: &rustix::fd::OwnedFd) -> Option<&'static str> {
    let magic = rustix::fs::fstatfs(directory).ok()?.f_type;
    network_kind(u64::try_from(magic).ok()? & 0xffff_ffff)
}

/// By the numbers of statfs(2).
#[cfg(target_os = "linux")]
fn network_kind(magic: u64) -> Option<&'static str> {
    let known = [
        (0x6969, "NFS"),
        (0x517b, "SMB"),
        (0xff53_4d42, "CIFS"),
        (0xfe53_4d42, "SMB2"),
        (0x5346_414f, "AFS"),
        (0x00c3_6400, "Ceph"),
        (0x0bd0_0bd0, "Lustre"),
        (0x0102_1997, "9P"),
    ];
    known.iter().find(|kind| kind.0 == magic).map(|kind| kind.1)
}

#[cfg(not(target_os = "linux"))]
fn network_file_system(_: &rustix::fd::OwnedFd) -> Option<&'static str> {
    None
}

/// How many bytes of events a store in `path` may hold: a quarter of a small file system.
pub fn store_limit(path: &Path) -> u64 {
    let whole = statvfs(path).map_or(u64::MAX, |size| size.f_blocks.saturating_mul(size.f_frsize));
    LARGEST_STORE.min(whole / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_project_one_place() {
        let place = default_path("django /srv/news/news/settings.py");
        assert_eq!(place, default_path("django /srv/news/news/settings.py"));
        assert_ne!(place, default_path("django /srv/shop/news/settings.py"));
        assert!(place.as_os_str().len() < LONGEST);
    }

    #[test]
    fn network_file_systems_are_known() {
        assert_eq!(network_kind(0x6969), Some("NFS"));
        assert_eq!(network_kind(0x0102_1994), None, "tmpfs");
        assert_eq!(network_kind(0xef53), None, "ext4");
    }
}
