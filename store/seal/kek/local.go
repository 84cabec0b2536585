package kek

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/workspaced/workspaced/store/seal"
)

func openFile(_ context.Context, s source, create bool) (seal.KEK, error) {
	load := seal.Load
	if create {
		load = seal.LoadOrCreate
	}
	return orNil(load(s.rest))
}

func openEnv(_ context.Context, s source, _ bool) (seal.KEK, error) {
	name := "environment variable " + s.rest
	value, ok := os.LookupEnv(s.rest)
	if !ok {
		return nil, fmt.Errorf("%s is not set: %w", name, fs.ErrNotExist)
	}
	return orNil(seal.Parse(name, []byte(value)))
}

// maxCredentialBytes is systemd's own limit.
const maxCredentialBytes = 1 << 20

func openCredential(_ context.Context, s source, _ bool) (seal.KEK, error) {
	b, err := readCredential(s.rest)
	if err != nil {
		return nil, err
	}
	return orNil(seal.Parse("credential "+s.rest, b))
}

// credentialsDirectory is where systemd shows this service its credentials; empty:
// it has none.
func credentialsDirectory() string { return os.Getenv("CREDENTIALS_DIRECTORY") }

func readCredential(name string) ([]byte, error) {
	dir := credentialsDirectory()
	if dir == "" {
		return nil, fmt.Errorf("credential %s is not there: the service has none, LoadCredential= or LoadCredentialEncrypted= in its unit give it: %w", name, fs.ErrNotExist)
	}
	return readPrivate("credential "+name, filepath.Join(dir, name))
}

// readPrivate reads a small file that only its owner, and maybe its group, may read.
func readPrivate(what, path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s can't be opened: %w", what, err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s can't be examined: %w", what, err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", what)
	case info.Mode().Perm()&0o007 != 0:
		return nil, fmt.Errorf("%s has mode %#o, which lets others at it", what, info.Mode().Perm())
	case info.Size() > maxCredentialBytes:
		return nil, fmt.Errorf("%s has more than %d bytes", what, maxCredentialBytes)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxCredentialBytes))
	if err != nil {
		return nil, fmt.Errorf("%s can't be read: %w", what, err)
	}
	return b, nil
}

// orNil keeps a nil *seal.Local from becoming a KEK that is not nil.
func orNil(key *seal.Local, err error) (seal.KEK, error) {
	if err != nil {
		return nil, err
	}
	return key, nil
}
