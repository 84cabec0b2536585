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
		case target == handshake.InitPath || below(target, handshake.Dir) || below(target, runtime.FilesDir):
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
		} else if !filepath.IsAbs(m.HostPath) {
			return all, volumeFailure(nil, "host path %q is not absolute", m.HostPath)
		} else if _, err := os.Stat(source); err != nil {
			return all, volumeFailure(err, "host path %q: %v", m.HostPath, errors.Unwrap(err))
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

// below reports whether the path is the directory, or in it.
func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

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
