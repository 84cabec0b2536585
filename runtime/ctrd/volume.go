package ctrd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// Both become file names. They are checked where they come in, and again here.
var (
	workspaceID = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	volumeName  = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)
)

func volumeFailure(err error, format string, args ...any) error {
	return &runtime.Error{Reason: runtime.ReasonVolume, Message: fmt.Sprintf(format, args...), Err: err}
}

// mounted is what a spec mounts.
type mounted struct {
	mounts []specs.Mount
	// unowned are volumes that get their owner when the container's user is known.
	unowned []string
	// made are those of them that were made just now.
	made []string
	// host are the host paths, held open until close.
	host []hostMount
}

// hostMount is what a host path has led to, and where it is mounted.
type hostMount struct {
	file         *os.File
	path, target string
}

func (m *mounted) close() {
	for _, h := range m.host {
		h.file.Close()
	}
}

// unmake removes the volumes that were made for a container that did not come
// to be, so that the next one makes them anew.
func (m *mounted) unmake() {
	for _, dir := range m.made {
		_ = unix.Rmdir(dir) // one that holds something stays
	}
}

// mounts returns the mounts of the spec, outer ones before those within them,
// and makes its volumes' directories. What it made is told beside an error too.
func (d *Driver) mounts(spec runtime.Spec) (all mounted, err error) {
	for _, m := range spec.Mounts {
		target := filepath.Clean(m.Path)
		switch {
		case !filepath.IsAbs(m.Path) || target == "/":
			return all, volumeFailure(nil, "mount path %q: want an absolute path below /", m.Path)
		case target == handshake.InitPath || runtime.Within(target, handshake.Dir) || runtime.Within(target, runtime.FilesDir):
			return all, volumeFailure(nil, "mount path %q belongs to workspaced", m.Path)
		case (m.HostPath == "") == (m.Volume == ""):
			return all, volumeFailure(nil, "mount %q: want either a host path or a volume", m.Path)
		}
		source := filepath.Clean(m.HostPath)
		if m.Volume != "" {
			var state volumeState
			if source, state, err = d.makeVolume(spec.WorkspaceID, m.Volume); err != nil {
				return all, volumeFailure(err, "volume %q can't be made: %v", m.Volume, errors.Unwrap(err))
			}
			if state != volumeInUse {
				all.unowned = append(all.unowned, source)
			}
			if state == volumeMade {
				all.made = append(all.made, source)
			}
		} else {
			if !filepath.IsAbs(m.HostPath) {
				return all, volumeFailure(nil, "host path %q is not absolute", m.HostPath)
			}
			file, err := d.openHostPath(source)
			if err != nil {
				return all, err
			}
			all.host = append(all.host, hostMount{file, source, target})
		}
		options := []string{"rbind", "rprivate", "rw"}
		if m.ReadOnly {
			options[2] = "ro"
		}
		all.mounts = append(all.mounts, specs.Mount{Destination: target, Type: "bind", Source: source, Options: options})
	}
	slices.SortStableFunc(all.mounts, func(a, b specs.Mount) int {
		return cmp.Compare(strings.Count(a.Destination, "/"), strings.Count(b.Destination, "/"))
	})
	return all, nil
}

// openHostPath opens what a host path leads to, if that lies within what the
// settings allow: a container that has mounted a part of it may have put a link
// there.
func (d *Driver) openHostPath(path string) (*os.File, error) {
	err := notAllowed("host path %q: the daemon's setting allowed_host_paths has nothing that it lies in", path)
	for _, dir := range d.cfg.Policy.HostPaths {
		if !runtime.Within(path, dir) {
			continue
		}
		var file *os.File
		if file, err = openBeneath(dir, path); err == nil {
			return file, nil
		}
		if errors.Is(err, unix.EXDEV) {
			err = notAllowed("host path %q leads out of %s, which the daemon's setting allowed_host_paths names", path, dir)
			continue
		}
		err = volumeFailure(err, "host path %q: %v", path, errors.Unwrap(err))
	}
	return nil, err
}

// openBeneath opens path, which lies within dir by its name, without leaving dir.
// The file can be asked what it is, and nothing else.
func openBeneath(dir, path string) (*os.File, error) {
	if dir == "/" {
		return openPath(unix.AT_FDCWD, path, 0) // nothing leads out, absolute links neither
	}
	root, err := openPath(unix.AT_FDCWD, dir, 0)
	if err != nil || path == dir {
		return root, err
	}
	defer root.Close()
	below, err := filepath.Rel(dir, path)
	if err != nil {
		return nil, err
	}
	return openPath(int(root.Fd()), below, unix.RESOLVE_BENEATH)
}

func openPath(dir int, path string, resolve uint64) (*os.File, error) {
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: resolve})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// checkHostMounts sees that a container, of which nothing has run yet but its
// init, has mounted what its host paths led to when they were checked. The OCI
// runtime follows them once more, and a link may have changed meanwhile.
func checkHostMounts(pid int, mounts []hostMount) error {
	if len(mounts) == 0 {
		return nil
	}
	root, err := openPath(unix.AT_FDCWD, fmt.Sprintf("/proc/%d/root", pid), 0)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, m := range mounts {
		there, err := openPath(int(root.Fd()), m.target, unix.RESOLVE_IN_ROOT)
		if err != nil {
			return volumeFailure(err, "host path %q is not where it was mounted: %v", m.path, errors.Unwrap(err))
		}
		same, err := sameFile(m.file, there)
		there.Close()
		if err != nil {
			return err
		}
		if !same {
			return volumeFailure(nil, "host path %q led elsewhere a moment later", m.path)
		}
	}
	return nil
}

func sameFile(a, b *os.File) (bool, error) {
	sa, errA := a.Stat()
	sb, errB := b.Stat()
	return errA == nil && errB == nil && os.SameFile(sa, sb), errors.Join(errA, errB)
}

// volumeState tells whose a volume's directory is.
type volumeState int

const (
	volumeInUse volumeState = iota // somebody's
	// volumeUnowned: there, but empty and root's, as it is when a daemon died before
	// it gave it to its user.
	volumeUnowned
	volumeMade // just now
)

// makeVolume returns the directory of a named volume.
func (d *Driver) makeVolume(workspace, name string) (dir string, state volumeState, err error) {
	if !volumeName.MatchString(name) {
		return "", 0, &os.PathError{Op: "volume", Path: name, Err: errors.New("want lower case letters, digits, dots and dashes")}
	}
	parent := filepath.Join(d.volumes, workspace)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return "", 0, err
	}
	dir = filepath.Join(parent, name)
	err = os.Mkdir(dir, 0o755)
	if err == nil {
		return dir, volumeMade, nil
	} else if !errors.Is(err, os.ErrExist) {
		return "", 0, err
	}
	// No container can put a link here, only who is root on the host; but root's
	// mistakes shall not become mounts.
	st, err := os.Lstat(dir)
	if err != nil {
		return "", 0, err
	}
	if !st.IsDir() {
		return "", 0, &os.PathError{Op: "volume", Path: dir, Err: errors.New("it is not a directory")}
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || sys.Uid != 0 || sys.Gid != 0 {
		return dir, volumeInUse, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", 0, err
	}
	if len(entries) > 0 {
		return dir, volumeInUse, nil
	}
	return dir, volumeUnowned, nil
}

// own gives new volumes to the user that the container runs as.
func own(dirs []string, user specs.User) error {
	for _, dir := range dirs {
		if err := os.Lchown(dir, int(user.UID), int(user.GID)); err != nil {
			return volumeFailure(err, "volume %q can't be given to its user: %v", filepath.Base(dir), errors.Unwrap(err))
		}
	}
	return nil
}

// RemoveWorkspace removes the workspace's logs, its cgroups and, unless they are
// kept, its volumes. Its instances have been removed before. That it belongs to
// uid is the caller's word: what is removed is named by the id.
func (d *Driver) RemoveWorkspace(ctx context.Context, id, uid string, keepVolumes bool) error {
	if !workspaceID.MatchString(id) {
		return nil // nothing was ever made under such a name
	}
	d.mu.Lock()
	delete(d.recordedOf, uid)
	d.mu.Unlock()
	ctx, cancel := d.bound(ctx, d.deadlines.remove)
	defer cancel()
	return failure(ctx, "removing the files of workspace "+id, d.removeFiles(ctx, id, keepVolumes))
}

func (d *Driver) removeFiles(ctx context.Context, id string, keepVolumes bool) error {
	if err := d.step(ctx, stepLogRemove, func(context.Context) error { return d.removeLogs(id) }); err != nil {
		return err
	}
	if !keepVolumes {
		dir := filepath.Join(d.volumes, id)
		if err := d.step(ctx, stepVolumesRemove, func(context.Context) error { return os.RemoveAll(dir) }); err != nil {
			return err
		}
	}
	return d.step(ctx, stepParentRemove, func(context.Context) error {
		d.removeEmptyCgroup(filepath.Join(d.cfg.Namespace, id))
		return nil
	})
}
