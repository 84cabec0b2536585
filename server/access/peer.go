package access

import (
	"errors"
	"net"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// unixPeer is the process at the other end of a unix socket, as it was when it
// connected.
type unixPeer struct {
	uid  uint32
	gids []uint32 // its own first, then the supplementary ones
}

// peerOf asks the kernel. The supplementary groups are the kernel's as well, those
// that the process has, and not those that /etc/group gives its user: they are
// what decides over files, no directory service has to be asked, and a process
// that has given up a group does not get it back here.
func peerOf(conn *net.UnixConn) (p unixPeer, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return p, err
	}
	failed := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil {
			return
		}
		var groups []uint32
		groups, err = peerGroups(fd)
		p = unixPeer{uid: cred.Uid, gids: slices.Concat([]uint32{cred.Gid}, groups)}
	})
	return p, errors.Join(failed, err)
}

// peerGroups reads SO_PEERGROUPS (Linux 4.13), for which x/sys has no function.
func peerGroups(fd uintptr) ([]uint32, error) {
	for n := 64; n <= 1<<16; n *= 4 { // NGROUPS_MAX is 65536
		groups := make([]uint32, n)
		size := uint32(4 * n)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0) //nolint:gosec // as x/sys does it
		switch errno {
		case 0:
			return groups[:size/4], nil
		case unix.ERANGE: // there are more
		default:
			return nil, errno
		}
	}
	return nil, unix.ERANGE
}
