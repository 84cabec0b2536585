package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// asDaemon makes the test binary be the daemon's program; see TestMain.
const asDaemon = "WORKSPACED_TEST_AS_DAEMON"

// process runs the daemon's program as a process of its own, to its end.
func (in *instance) process(more ...string) (stderr string, code int) {
	in.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], append(append([]string{"serve"}, in.args...), more...)...)
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "WORKSPACED_") {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	cmd.Env = append(cmd.Env, asDaemon+"=1")
	var out bytes.Buffer
	cmd.Stderr = &out
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return out.String(), exit.ExitCode()
	}
	if err != nil {
		in.t.Fatalf("%v\n%s", err, &out)
	}
	return out.String(), 0
}

// content is every file below a directory: mode and hash of its content.
func content(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		hash := ""
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(data)
			hash = hex.EncodeToString(sum[:])
		}
		files[path] = info.Mode().String() + " " + hash
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// refuses runs the daemon on what can't be trusted or used: it ends with code 1
// and one sentence, and what lasts stays as it is, to the byte.
func (in *instance) refuses(want ...string) {
	in.t.Helper()
	before := content(in.t, in.path("data"))
	stderr, code := in.process()
	if code != 1 {
		in.t.Errorf("exit code %d, want 1", code)
	}
	sentence, ok := strings.CutPrefix(strings.TrimSuffix(stderr, "\n"), "workspaced: ")
	if !ok || strings.Contains(sentence, "\n") {
		in.t.Errorf("it says, want one sentence:\n%s", stderr)
	}
	for _, want := range want {
		if !strings.Contains(sentence, want) {
			in.t.Errorf("it says %q, want something with %q", sentence, want)
		}
	}
	if diff := cmp.Diff(before, content(in.t, in.path("data"))); diff != "" {
		in.t.Errorf("it changed something:\n%s", diff)
	}
}

// fill makes database and key with a workspace and a secret in them.
func (in *instance) fill() {
	in.t.Helper()
	if err := os.Mkdir(in.path("data"), 0o700); err != nil {
		in.t.Fatal(err)
	}
	st := in.open(nil)
	_, err := st.CreateWorkspace(in.t.Context(), store.NewWorkspace{
		ID: "w", Spec: store.Spec{Image: "registry.invalid/app:1"}, Secrets: []store.SecretValue{{Key: "K", Value: seal.New([]byte("v"))}},
	}, store.Options{})
	if err != nil {
		in.t.Fatal(err)
	}
	if _, err := st.StopWorkspace(in.t.Context(), "w", store.Options{}); err != nil {
		in.t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		in.t.Fatal(err)
	}
}

// open opens the instance's database beside the daemon, with a clock.
func (in *instance) open(now func() time.Time) *store.Store {
	in.t.Helper()
	kek, err := seal.LoadOrCreate(in.path("data/workspaced.key"))
	if err != nil {
		in.t.Fatal(err)
	}
	st, err := store.Open(store.Config{Path: in.path("data/workspaced.db"), KEK: kek, Now: now})
	if err != nil {
		in.t.Fatal(err)
	}
	return st
}

// TestContract23_TheDaemonRefuses: what can't be trusted is refused in one clear
// sentence, with nothing changed; put right, it is taken.
func TestContract23_TheDaemonRefuses(t *testing.T) {
	in := newInstance(t)
	in.fill()
	key, db := in.path("data/workspaced.key"), in.path("data/workspaced.db")
	// damaged puts other bytes in the place of a file, for as long as the test runs.
	damaged := func(t *testing.T, path string, edit func([]byte) []byte) {
		t.Helper()
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		write := func(data []byte) error { return os.WriteFile(path, data, 0o600) }
		if err := write(edit(bytes.Clone(good))); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := write(good); err != nil {
				t.Error(err)
			}
		})
	}
	for _, tt := range []struct {
		name string
		do   func(t *testing.T)
		want []string
	}{
		{"database overwritten", func(t *testing.T) {
			damaged(t, db, func(b []byte) []byte {
				for i := range 2 * os.Getpagesize() {
					b[i] = 0xff
				}
				return b
			})
		}, []string{db, "damaged", "restore it from a backup"}},
		{"database cut off", func(t *testing.T) {
			damaged(t, db, func(b []byte) []byte { return b[:len(b)/2] })
		}, []string{db, "damaged", "restore it from a backup"}},
		{"database emptied", func(t *testing.T) {
			damaged(t, db, func([]byte) []byte { return nil })
		}, []string{db, "is empty", "restore it from a backup"}},
		{"something else in its place", func(t *testing.T) {
			damaged(t, db, func([]byte) []byte { return bytes.Repeat([]byte("SQLite format 3\x00"), 4096) })
		}, []string{db, "damaged"}},
		{"newer schema", func(t *testing.T) {
			damaged(t, db, func(b []byte) []byte { return b }) // puts it back
			editSchema(t, db, 4711)
		}, []string{db, "schema version 4711", "run a newer one"}},
		{"wrong key", func(t *testing.T) {
			other := filepath.Join(t.TempDir(), "key")
			if _, err := seal.LoadOrCreate(other); err != nil {
				t.Fatal(err)
			}
			damaged(t, key, func([]byte) []byte {
				b, err := os.ReadFile(other)
				if err != nil {
					t.Fatal(err)
				}
				return b
			})
		}, []string{db, "sealed with another key"}},
		{"key damaged", func(t *testing.T) {
			damaged(t, key, func(b []byte) []byte { return b[:len(b)/2] })
		}, []string{key, "restore it from a backup"}},
		{"key lost", func(t *testing.T) {
			damaged(t, key, func(b []byte) []byte { return b }) // puts it back
			if err := os.Remove(key); err != nil {
				t.Fatal(err)
			}
		}, []string{db, key, "put it back from a backup"}},
		{"key open to all", func(t *testing.T) {
			if err := os.Chmod(key, 0o644); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := os.Chmod(key, 0o600); err != nil {
					t.Error(err)
				}
			})
		}, []string{key}},
		{"database in use", func(t *testing.T) {
			st := in.open(nil)
			t.Cleanup(func() { st.Close() })
		}, []string{db, "in use by another process"}},
		{"data directory read-only", func(t *testing.T) {
			readOnly(t, in.path("data"))
		}, []string{in.path("data"), "read-only file system"}},
		{"state directory full", func(t *testing.T) {
			fullTmpfs(t, in.path("run"))
		}, []string{in.path("run"), "no space left"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.do(t)
			at := *in
			at.t = t
			at.refuses(tt.want...)
		})
	}
	t.Run("put right", func(t *testing.T) {
		at := *in
		at.t = t
		if err := at.serve().stop(); err != nil {
			t.Error(err)
		}
	})
}

// editSchema writes another schema version into the database.
func editSchema(t *testing.T, path string, version uint64) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("meta")).Put([]byte("schema"), binary.BigEndian.AppendUint64(nil, version))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

// readOnly makes a directory read-only until the test ends.
func readOnly(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unmount(t, dir) })
	if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
}

// fullTmpfs mounts a file system without room over a directory until the test
// ends.
func fullTmpfs(t *testing.T, dir string) {
	t.Helper()
	tmpfs(t, dir, "size=4k,nr_inodes=16")
	fillUp(t, filepath.Join(dir, "filler"))
}

// tmpfs mounts a file system over a directory, which is made at need, until the
// test ends.
func tmpfs(t *testing.T, dir, options string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options+",mode=750"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unmount(t, dir) })
}

func unmount(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Unmount(dir, 0); err != nil {
		t.Errorf("unmount %s: %v", dir, err)
	}
}

// fillUp takes what is left of a file system.
func fillUp(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 64 << 10; size > 0; size /= 2 {
		for err == nil {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		err = nil
	}
}
