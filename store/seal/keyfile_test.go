package seal_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/workspaced/workspaced/store/seal"
)

func TestLoadOrCreate_MakesFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	a, err := seal.LoadOrCreate(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("mode is %v", info.Mode())
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := seal.LoadOrCreate(path)
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Error("the second start changed the file")
	}
	sealed, err := a.EncryptWithContext(t.Context(), []byte("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := b.DecryptWithContext(t.Context(), sealed, nil); err != nil || string(got) != "x" {
		t.Errorf("the second start can't open: %q, %v", got, err)
	}
	onlyFile(t, dir, "key")
}

// onlyFile checks that nothing else was left in a directory.
func onlyFile(t *testing.T, dir, name string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != name {
			t.Errorf("%s was left behind", e.Name())
		}
	}
}

func TestLoadOrCreate_AtOnce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	keys := make([]*seal.Local, 16)
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() {
			key, err := seal.LoadOrCreate(path)
			if err != nil {
				t.Error(err)
			}
			keys[i] = key
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	sealed, err := keys[0].EncryptWithContext(t.Context(), []byte("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, key := range keys {
		if _, err := key.DecryptWithContext(t.Context(), sealed, nil); err != nil {
			t.Errorf("number %d got another key", i)
		}
	}
	onlyFile(t, dir, "key")
}

func TestLoad_NeverCreates(t *testing.T) {
	dir := t.TempDir()
	if _, err := seal.Load(filepath.Join(dir, "key")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	onlyFile(t, dir, "")
}

func TestLoadOrCreate_Refuses(t *testing.T) {
	tests := map[string]struct {
		prepare func(t *testing.T, path string) // a good key file is at path
		want    string
	}{
		"group can read":    {chmod(0o640), "has mode 0640"},
		"others can read":   {chmod(0o604), "has mode 0604"},
		"group can write":   {chmod(0o620), "has mode 0620"},
		"others can search": {chmod(0o601), "has mode 0601"},
		"empty":             {content(nil), "holds no keyset"},
		"garbage":           {content([]byte("not a keyset " + canary)), "holds no keyset"},
		"other JSON":        {content([]byte(`{"primaryKeyId": 1}`)), "holds no keyset"},
		"cut in half": {func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			content(b[:len(b)/2])(t, path)
		}, "holds no keyset"},
		"too large": {func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			content(append(b, bytes.Repeat([]byte(" "), 2<<20)...))(t, path)
		}, "holds no keyset"},
		"directory": {replace(func(path string) error { return os.Mkdir(path, 0o700) }), "is not a regular file"},
		"FIFO":      {replace(func(path string) error { return syscall.Mkfifo(path, 0o600) }), "is not a regular file"},
		"device": {replace(func(path string) error { return os.Symlink("/dev/null", path) }),
			"is not a regular file"},
		"link to one that others can read": {replace(func(path string) error {
			if err := os.WriteFile(path+".target", nil, 0o644); err != nil {
				return err
			}
			return os.Symlink(path+".target", path)
		}), "has mode 0644"},
		"another user's": {func(t *testing.T, path string) {
			if os.Geteuid() != 0 {
				t.Skip("SKIPPED: only root can give a file away")
			}
			if err := os.Chown(path, 12345, 12345); err != nil {
				t.Fatal(err)
			}
		}, "belongs to user 12345"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "key")
			if _, err := seal.LoadOrCreate(path); err != nil {
				t.Fatal(err)
			}
			test.prepare(t, path)
			before, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = seal.LoadOrCreate(path)
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), path) {
				t.Fatalf("got %v, want one that says %q and names the file", err, test.want)
			}
			if strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), canary) {
				t.Errorf("not one clean sentence: %v", err)
			}
			after, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			if !os.SameFile(before, after) || before.Mode() != after.Mode() || !before.ModTime().Equal(after.ModTime()) {
				t.Error("the file was changed")
			}
		})
	}
}

func chmod(mode os.FileMode) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
}

func content(b []byte) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func replace(with func(path string) error) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := with(path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLoadOrCreate_NoDirectory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "missing", "key")
	if _, err := seal.LoadOrCreate(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
}
