package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// filled returns a harness with some of everything, large enough for a tree of
// pages.
func filled(t testing.TB) *harness { return filledWith(t, 40, 300) }

// filledWith is filled with so many workspaces, and a secret of that size each.
func filledWith(t testing.TB, workspaces, size int) *harness {
	t.Helper()
	h := newHarness(t)
	for i := range workspaces {
		h.create(fmt.Sprintf("w%02d", i), value("K", strings.Repeat("v", size)), value("L", "2"))
	}
	must(h.UpdateSecrets(ctx, Scope{}, set("G", strings.Repeat("g", 20_000)), request("id", "one")))(t)
	h.remove(fmt.Sprintf("w%02d", min(7, workspaces-1)))
	return h
}

// closeAndRead closes the database and returns the part of its file that is used:
// what the file has grown ahead is nothing but a hole.
func (h *harness) closeAndRead() []byte {
	h.t.Helper()
	var used int64
	if err := h.view(func(tx *bolt.Tx) error { used = tx.Size(); return nil }); err != nil {
		h.t.Fatal(err)
	}
	h.close()
	return must(os.ReadFile(h.cfg.Path))(h.t)[:used]
}

// refused checks that Open refuses the file with one clear sentence, changes
// nothing and holds on to nothing.
func refused(t *testing.T, cfg Config, want error) {
	t.Helper()
	before := readDir(t, cfg.Path)
	s, err := Open(cfg)
	if err == nil {
		_ = s.Close()
		t.Fatal("it was opened")
	}
	var open *OpenError
	if !errors.Is(err, want) || !errors.As(err, &open) || open.Path != cfg.Path {
		t.Errorf("got %v, want %v", err, want)
	}
	text := err.Error()
	if strings.Contains(text, "\n") || strings.Contains(text, "panic") || !strings.Contains(text, cfg.Path) || len(text) > 300 {
		t.Errorf("not one clear sentence: %s", text)
	}
	if !maps.EqualFunc(before, readDir(t, cfg.Path), bytes.Equal) {
		t.Error("something was changed")
	}
}

// readDir returns the files beside the database, by name.
func readDir(t *testing.T, path string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		files[e.Name()] = nil
		if !e.Type().IsRegular() {
			continue
		}
		b, err := os.ReadFile(filepath.Join(filepath.Dir(path), e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = b
	}
	return files
}

func TestContract23_DamagedDatabase(t *testing.T) {
	h := filled(t)
	good := h.closeAndRead()

	write := func(b []byte) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	edit := func(f func(*bolt.Tx) error) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			db := must(bolt.Open(path, 0o600, nil))(t)
			if err := errors.Join(db.Update(f), db.Close()); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := map[string]func(t *testing.T, path string){
		"empty":        write(nil),
		"short":        write([]byte("x")),
		"text":         write([]byte(strings.Repeat("not a database\n", 10_000))),
		"zeros":        write(make([]byte, len(good))),
		"a byte short": write(good[:len(good)-1]),
		"cut in half":  write(good[:len(good)/2]),
		"two pages":    write(good[:2*os.Getpagesize()]),
		"one page":     write(good[:os.Getpagesize()]),
		"both metas":   write(append(make([]byte, 2*os.Getpagesize()), good[2*os.Getpagesize():]...)),
		"foreign":      edit(func(tx *bolt.Tx) error { return tx.DeleteBucket(bucketMeta) }),
		"no schema":    edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Delete(metaSchema) }),
		"no instance":  edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Delete(metaInstance) }),
		"no key check": edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Delete(metaCheck) }),
		"directory": func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
				t.Fatal(err)
			}
		},
		"FIFO": func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)); err != nil {
				t.Fatal(err)
			}
		},
	}
	for _, name := range allBuckets[1:] {
		tests["no "+string(name)] = edit(func(tx *bolt.Tx) error { return tx.DeleteBucket(name) })
	}
	for name, damage := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := h.cfg
			cfg.Path = filepath.Join(t.TempDir(), "workspaced.db")
			write(good)(t, cfg.Path)
			damage(t, cfg.Path)
			refused(t, cfg, ErrDamaged)

			// Putting the backup back is all it takes.
			if err := os.Remove(cfg.Path); err != nil {
				t.Fatal(err)
			}
			write(good)(t, cfg.Path)
			s := must(Open(cfg))(t)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Each page in turn is overwritten, in several ways. The database is refused,
// or everything is there: nothing in between, and no crash.
func TestContract23_DamagedPages(t *testing.T) {
	h := filled(t)
	want := dump(t, h.db)
	for key := range want["sealed"] {
		want["sealed"][key] = ""
	}
	good := h.closeAndRead()
	size := os.Getpagesize()
	random := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, size)
	for i := range noise {
		noise[i] = byte(random.Uint32())
	}
	damages := map[string]func(page []byte){
		"zeros":          func(page []byte) { clear(page) },
		"ones":           func(page []byte) { copy(page, bytes.Repeat([]byte{0xff}, size)) },
		"noise":          func(page []byte) { copy(page, noise) },
		"noise, id kept": func(page []byte) { copy(page[8:], noise[8:]) },
		"count":          func(page []byte) { page[10], page[11] = 0xff, 0xff },
		"overflow":       func(page []byte) { page[14] = 0x7f },
		"first element":  func(page []byte) { copy(page[16:32], noise) },
		"another page":   func(page []byte) { copy(page, good[5*size:6*size]) },
	}
	refusals := 0
	for name, damage := range damages {
		for page := 2; page < len(good)/size; page++ { // 0 and 1 stand in for each other
			cfg := h.cfg
			cfg.Path = filepath.Join(t.TempDir(), "workspaced.db")
			bad := bytes.Clone(good)
			damage(bad[page*size : (page+1)*size])
			if bytes.Equal(bad, good) {
				continue
			}
			if err := os.WriteFile(cfg.Path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := Open(cfg)
			if err != nil {
				refusals++
				refused(t, cfg, ErrDamaged)
				continue
			}
			// bbolt's pages have no checksums. What hits but the bytes of a value is
			// for the value's own seal to notice.
			if name != "first element" && name != "noise, id kept" {
				got := dump(t, s.db)
				for key := range got["sealed"] {
					got["sealed"][key] = ""
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s in page %d is not noticed: %s", name, page, diff)
				}
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	if refusals < 50 {
		t.Errorf("only %d of the damaged databases were refused", refusals)
	}
	// A meta page whose checksum is wrong is what a power failure during a commit
	// can leave: the database opens, as it was before that commit. One that is no
	// meta page at all is damage.
	for page := range 2 {
		for name, damage := range map[string]func(page []byte){
			"torn": func(page []byte) { page[16+48] ^= 0xff }, // its transaction id
			"gone": func(page []byte) { clear(page) },
		} {
			cfg := h.cfg
			cfg.Path = filepath.Join(t.TempDir(), "workspaced.db")
			bad := bytes.Clone(good)
			damage(bad[page*size : (page+1)*size])
			if err := os.WriteFile(cfg.Path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			if name == "gone" {
				refused(t, cfg, ErrDamaged)
				continue
			}
			s, err := Open(cfg)
			if err != nil {
				t.Errorf("meta page %d: %v", page, err)
				continue
			}
			_ = s.Close()
		}
	}
}

func TestContract23_WrongKey(t *testing.T) {
	h := filled(t)
	h.close()
	cfg := h.cfg
	cfg.KEK = must(seal.LoadOrCreate(filepath.Join(t.TempDir(), "other")))(t)
	refused(t, cfg, ErrWrongKey)
	// The check value of another database with the same key does not help.
	other := newHarness(t)
	check := dump(t, other.db)["meta"]["check"]
	h.open()
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Put(metaCheck, []byte(check)) })
	h.close()
	refused(t, h.cfg, ErrWrongKey)
}

func TestContract23_ForeignSchema(t *testing.T) {
	h := filled(t)
	for _, version := range []uint64{schemaVersion + 1, 1 << 40} {
		h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Put(metaSchema, number(version)) })
		h.close()
		refused(t, h.cfg, ErrSchema)
		db := must(bolt.Open(h.cfg.Path, 0o600, nil))(t)
		h.db = db
		h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Put(metaSchema, number(schemaVersion)) })
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		h.open()
	}
}

func TestContract23_SecondDaemon(t *testing.T) {
	h := filled(t)
	refused(t, h.cfg, ErrLocked)
	h.create("still-works")
	h.reopen()
}

func TestOpen_New(t *testing.T) {
	h := newHarness(t)
	info := must(os.Stat(h.cfg.Path))(t)
	if info.Mode() != 0o600 {
		t.Errorf("mode is %v", info.Mode())
	}
	if len(h.InstanceUID()) != 36 || h.InstanceUID() == newHarness(t).InstanceUID() {
		t.Errorf("instance uid is %q", h.InstanceUID())
	}
	for name := range readDir(t, h.cfg.Path) {
		if name != "key" && name != "workspaced.db" {
			t.Errorf("%s was left behind", name)
		}
	}

	cfg := h.cfg
	cfg.Path = filepath.Join(t.TempDir(), "missing", "workspaced.db")
	if _, err := Open(cfg); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), cfg.Path) {
		t.Errorf("no directory: got %v", err)
	}
	cfg.KEK = nil
	if _, err := Open(cfg); err == nil {
		t.Error("no kek")
	}
}

// Whoever opens a new database at the same time gets the same one.
func TestOpen_AtOnce(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Path: filepath.Join(dir, "workspaced.db"), KEK: must(seal.LoadOrCreate(filepath.Join(dir, "key")))(t)}
	results := make(chan error, 4)
	for range cap(results) {
		go func() {
			s, err := Open(cfg)
			if err == nil {
				_, err = s.CreateWorkspace(ctx, NewWorkspace{ID: "a"}, Options{})
				err = errors.Join(err, s.Close())
			}
			results <- err
		}()
	}
	created := 0
	for range cap(results) {
		switch err := <-results; {
		case err == nil:
			created++
		case !errors.Is(err, ErrLocked) && !errors.Is(err, ErrExists):
			t.Error(err)
		}
	}
	if created != 1 {
		t.Errorf("%d created the workspace", created)
	}
}
