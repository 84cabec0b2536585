package ctrd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
)

// An instance's files lie in a directory of its own in the tmpfs, which it sees,
// read-only, as runtime.FilesDir:
//
//	KEY -> ..data/KEY
//	..data -> ..1234567890
//	..1234567890/KEY
//
// One rename of ..data puts all of them into place at once: who reads sees the
// files of one moment. What a crash leaves between two lines is a directory that
// ..data does not name, or a link too many or too few: the next write puts it
// right. Directories belong to the container's user too, mode 0500: nobody else in
// there can list them.

const (
	dataLink = "..data"
	// hidden is how all names begin that are not files'.
	hidden = ".."
)

// filesDir is what the container sees as runtime.FilesDir.
func (d *Driver) filesDir(uid, id string) string {
	return filepath.Join(d.instanceDir(uid, id), "files")
}

// makeFilesDir makes the directory for the container's user.
func makeFilesDir(dir string, user specs.User) error {
	return errors.Join(os.Mkdir(dir, 0o700), hand(dir, int(user.UID), int(user.GID)))
}

// hand gives a directory to the container's user.
func hand(dir string, uid, gid int) error {
	return errors.Join(os.Lchown(dir, uid, gid), os.Chmod(dir, 0o500))
}

// checkFiles refuses names that would not be files in the directory.
func checkFiles(files []runtime.File, keep []string) error {
	names := slices.Clone(keep)
	for _, f := range files {
		names = append(names, f.Name)
	}
	seen := make(map[string]bool, len(names))
	for _, name := range names {
		if !runtime.FileName.MatchString(name) || seen[name] {
			return &runtime.Error{
				Reason: runtime.ReasonRuntimeError, Message: fmt.Sprintf("%.140q is no name for a file, or comes twice", name), Permanent: true,
			}
		}
		seen[name] = true
	}
	return nil
}

// putFiles makes these the instance's files, with those of its present ones that
// are to be kept, all of them or none: after an error those of before are in place,
// or already the new ones. It returns the names, and may be repeated.
func (d *Driver) putFiles(ctx context.Context, rec *record, files []runtime.File, keep []string) (names []string, err error) {
	dir := d.filesDir(rec.WorkspaceUID, rec.ID)
	old, err := os.Readlink(filepath.Join(dir, dataLink))
	if err = ignoreMissing(err); err != nil {
		return nil, err
	}
	if len(files) == 0 && old == "" {
		return nil, nil
	}
	var data string
	err = d.step(ctx, stepFilesWrite, func(context.Context) (err error) {
		data, names, err = writeFiles(dir, old, files, keep)
		if errors.Is(err, unix.ENOSPC) && d.dropFilesReserve(rec) == nil {
			data, names, err = writeFiles(dir, old, files, keep)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	err = d.step(ctx, stepFilesSwitch, func(context.Context) error { return switchFiles(dir, data) })
	if err != nil {
		return nil, err
	}
	return names, d.step(ctx, stepFilesLink, func(context.Context) error { return linkFiles(dir, data, names) })
}

// writeFiles writes the files into a new directory, of which it returns the name,
// for the user that dir belongs to. Those that an earlier process did not come to
// put into place, or to remove, go first.
func writeFiles(dir, current string, files []runtime.File, keep []string) (data string, names []string, err error) {
	var owner unix.Stat_t
	if err := unix.Stat(dir, &owner); err != nil {
		return "", nil, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	if err := removeHidden(dir, current); err != nil {
		return "", nil, err
	}
	path, err := os.MkdirTemp(dir, hidden)
	if err != nil {
		return "", nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(path)) // it takes the room that was missing
		}
	}()
	for _, f := range files {
		if err := writeFile(filepath.Join(path, f.Name), f.Data, int(owner.Uid), int(owner.Gid)); err != nil {
			return "", nil, err
		}
		names = append(names, f.Name)
	}
	for _, name := range keep {
		err := os.Link(filepath.Join(dir, current, name), filepath.Join(path, name))
		if errors.Is(err, os.ErrNotExist) {
			continue // it has none to keep
		} else if err != nil {
			return "", nil, err
		}
		names = append(names, name)
	}
	return filepath.Base(path), names, hand(path, int(owner.Uid), int(owner.Gid))
}

func writeFile(path string, data []byte, uid, gid int) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Chown(uid, gid), f.Chmod(0o400), f.Close())
}

// removeHidden removes what neither is in place nor leads there.
func removeHidden(dir, current string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, hidden) && name != dataLink && name != current {
			if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

// switchFiles puts what writeFiles has written into place. A reader finds what was
// there before or what is there now, and nothing between.
func switchFiles(dir, data string) error {
	link := filepath.Join(dir, dataLink)
	if err := os.Symlink(data, link+".new"); err != nil {
		return err
	}
	return os.Rename(link+".new", link)
}

// linkFiles makes the names lead to what is in place, removes those of no file,
// and what was in place before.
func linkFiles(dir, data string, names []string) error {
	for _, name := range names {
		err := os.Symlink(filepath.Join(dataLink, name), filepath.Join(dir, name))
		if err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, hidden) || slices.Contains(names, name) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return removeHidden(dir, data)
}
