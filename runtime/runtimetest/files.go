package runtimetest

import (
	"errors"
	"io/fs"
	"path"
	"strings"
	"syscall"

	"github.com/workspaced/workspaced/runtime"
)

// WriteFile writes a file as an instance's command would: to a volume, a host
// path or the instance's own root, by its mounts. It returns syscall.EROFS where
// that is read-only.
func (f *Fake) WriteFile(instanceID, name, data string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	files, name, readOnly, err := f.locate(instanceID, name)
	if err != nil {
		return err
	}
	if readOnly {
		return &fs.PathError{Op: "write", Path: name, Err: syscall.EROFS}
	}
	if files == nil { // the workspace was removed
		return &fs.PathError{Op: "write", Path: name, Err: fs.ErrNotExist}
	}
	files[name] = data
	return nil
}

// ReadFile reads what WriteFile, of this instance or of another with the same
// volume, has written. It returns fs.ErrNotExist for what does not exist.
func (f *Fake) ReadFile(instanceID, name string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	files, name, _, err := f.locate(instanceID, name)
	if err != nil {
		return "", err
	}
	data, ok := files[name]
	if !ok {
		return "", &fs.PathError{Op: "read", Path: name, Err: fs.ErrNotExist}
	}
	return data, nil
}

// locate follows an instance's mounts, the longest that fits.
func (f *Fake) locate(instanceID, name string) (files map[string]string, inside string, readOnly bool, err error) {
	in := f.instances[instanceID]
	if in == nil {
		return nil, "", false, runtime.ErrNotFound
	}
	if !path.IsAbs(name) {
		return nil, "", false, errors.New("not an absolute path: " + name)
	}
	name = path.Clean(name)
	if rest, ok := strings.CutPrefix(name, runtime.FilesDir+"/"); ok {
		return in.secrets, rest, true, nil
	}
	files, inside, readOnly = in.files, name, in.spec.ReadOnlyRoot
	longest := 0
	for _, m := range in.spec.Mounts {
		at := path.Clean(m.Path)
		rest, ok := strings.CutPrefix(name, at+"/")
		if !ok || len(at) < longest {
			continue
		}
		longest, inside, readOnly = len(at), rest, m.ReadOnly
		if m.Volume != "" {
			files = f.volumes[in.WorkspaceID][m.Volume]
			continue
		}
		if f.hostFiles[m.HostPath] == nil {
			f.hostFiles[m.HostPath] = make(map[string]string)
		}
		files = f.hostFiles[m.HostPath]
	}
	return files, inside, readOnly, nil
}
