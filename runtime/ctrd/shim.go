package ctrd

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/defaults"
	"golang.org/x/sys/unix"
)

// shimGrace is how long a shim has between SIGTERM and SIGKILL.
const shimGrace = 2 * time.Second

// endOrphanShims ends the shims of an instance that containerd does not know.
// containerd forgets a shim when its client goes away in the middle of a create
// or a delete, as a daemon does that is killed.
func (d *Driver) endOrphanShims(ctx context.Context, id string) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || !d.isShim(pid, id) {
			continue
		}
		start, err := startTime(pid)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		p, err := openProcess(pid, start)
		if err != nil {
			return err
		}
		if p == nil {
			continue
		}
		if d.isShim(pid, id) { // still, now that it can't be another
			d.log.Info("ending a shim that containerd has forgotten", "instance", id, "pid", pid)
			err = d.stopProcess(ctx, p, unix.SIGTERM, shimGrace)
		}
		p.close()
		if err != nil {
			return err
		}
	}
	return nil
}

// isShim tells from its arguments whether a process is the instance's shim. The
// id is random enough to be nobody else's.
func (d *Driver) isShim(pid int, id string) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return false
	}
	args := strings.Split(string(b), "\x00")
	return strings.HasPrefix(filepath.Base(args[0]), "containerd-shim") &&
		hasFlag(args, "-namespace", d.cfg.Namespace) && hasFlag(args, "-id", id)
}

// removeShimSockets removes the sockets of a shim that was killed, which nobody
// else does. The names are those of containerd's pkg/shim.SocketAddress, in all
// its versions; the package itself would bring all that a shim needs.
func (d *Driver) removeShimSockets(id string) error {
	name := filepath.Join(strings.TrimPrefix(d.cfg.Address, "unix://"), d.cfg.Namespace, id)
	for _, name := range []string{name, filepath.Join(name, "debug")} {
		path := filepath.Join(defaults.DefaultStateDir, "s", fmt.Sprintf("%x", sha256.Sum256([]byte(name))))
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// bundleRoot is where containerd keeps the bundles of its shims, below the state
// directory, in which its socket is unless somebody has moved that.
const bundleRoot = "io.containerd.runtime.v2.task"

// removeBundle removes what containerd has left of a task that it has forgotten:
// it would do so itself only at its next start, and version 1.6 not even then.
// The caller knows that there is no such task, and no shim any more.
func (d *Driver) removeBundle(id string) error {
	state := filepath.Dir(strings.TrimPrefix(d.cfg.Address, "unix://"))
	bundle := filepath.Join(state, bundleRoot, d.cfg.Namespace, id)
	if _, err := os.Lstat(bundle); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	// The instance's snapshot may be mounted there still, more than once.
	rootfs := filepath.Join(bundle, "rootfs")
	for {
		err := unix.Unmount(rootfs, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // it is no mount point, or no longer
		} else if err != nil {
			return &os.PathError{Op: "unmount", Path: rootfs, Err: err}
		}
	}
	d.log.Info("removing a bundle that containerd has forgotten", "instance", id)
	return os.RemoveAll(bundle)
}

func hasFlag(args []string, flag, value string) bool {
	for i := range len(args) - 1 {
		if args[i] == flag && args[i+1] == value {
			return true
		}
	}
	return false
}
