package seal

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// maxKeyFileBytes is far more than any keyset takes.
const maxKeyFileBytes = 1 << 20

// LoadOrCreate reads the key file at path, or makes it, with a new key, when
// there is none: whole or not at all, mode 0600, durable before it returns, and
// never over a file that is there. Two that do so at once get the same key.
//
// The file is refused when it is not a regular file, belongs to another user,
// can be accessed by group or others, or holds no usable keyset. Each error is
// one sentence that names the file.
func LoadOrCreate(path string) (*Local, error) {
	key, err := Load(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if err := create(path); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("key file %s can't be made: %w", path, err)
	}
	return Load(path)
}

// Load is LoadOrCreate for a key file that has to be there; the error wraps
// fs.ErrNotExist when it is not. Use it when there is a database already: a new
// key could not open anything in it.
func Load(path string) (*Local, error) {
	// O_NONBLOCK: opening a FIFO must not wait for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("key file can't be opened: %w", err)
	}
	defer func() { _ = f.Close() }()
	// What was opened is looked at, not what the path may name by then.
	if err := checkKeyFile(f, path); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxKeyFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("key file %s can't be read: %w", path, err)
	}
	return parseLocal("key file "+path, b)
}

func checkKeyFile(f *os.File, path string) error {
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("key file %s can't be examined: %w", path, err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("key file %s is not a regular file", path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("key file %s belongs to user %d and not to user %d, who runs this", path, st.Uid, os.Geteuid())
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("key file %s has mode %#o, which lets group or others at it: chmod 600 it", path, perm)
	}
	return nil
}

// create makes a key file unless there is one (fs.ErrExist).
func create(path string) (err error) {
	b, err := NewLocal()
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(tmp.Name())) }()
	_, err = tmp.Write(b)
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	// A link, unlike a rename, never replaces what is there.
	if err := os.Link(tmp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
