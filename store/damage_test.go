package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

// Whatever happens to a page while the database is open: each call gives what is
// true, or an error; nothing hangs, nothing crashes, and the next start refuses
// it or finds everything.
func TestDamagedPages_WhileRunning(t *testing.T) {
	seed := filledWith(t, 12, 1000)
	want := readAll(t, seed)
	good := seed.closeAndRead()
	size := os.Getpagesize()
	random := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, size)
	for i := range noise {
		noise[i] = byte(random.Uint32())
	}
	damages := map[string]func(page []byte){
		"zeros":         func(page []byte) { clear(page) },
		"ones":          func(page []byte) { copy(page, bytes.Repeat([]byte{0xff}, size)) },
		"noise":         func(page []byte) { copy(page, noise) },
		"count":         func(page []byte) { page[10], page[11] = 0xff, 0xff },
		"first element": func(page []byte) { copy(page[16:32], noise) },
		"another page":  func(page []byte) { copy(page, good[5*size:6*size]) },
	}
	unused := freePages(t, good)
	failures := 0
	for name, damage := range damages {
		for id := range len(good) / size {
			if unused[id] {
				continue
			}
			h := &harness{t: t, cfg: seed.cfg, clock: seed.clock, record: &recorder{}}
			h.cfg.Path = filepath.Join(t.TempDir(), "workspaced.db")
			if err := os.WriteFile(h.cfg.Path, good, 0o600); err != nil {
				t.Fatal(err)
			}
			h.open()
			bad := bytes.Clone(good[id*size : (id+1)*size])
			damage(bad)
			copy(bad[12:16], good[id*size+12:]) // a length that is damaged can cost bbolt all memory there is
			overwrite(t, h.cfg.Path, int64(id*size), bad)
			within(t, time.Minute, func() {
				failures += checkTruth(t, h, fmt.Sprint(name, " in page ", id), want)
				if err := h.Close(); err != nil && !errors.Is(err, ErrDamaged) {
					t.Errorf("%s in page %d: Close: %v", name, id, err)
				}
				s, err := Open(h.cfg)
				if err != nil && !errors.Is(err, ErrDamaged) {
					t.Errorf("%s in page %d: Open: %v", name, id, err)
				}
				if err == nil {
					_ = s.Close()
				}
			})
		}
	}
	if failures < 100 {
		t.Errorf("only %d calls have met the damage", failures)
	}
}

// freePages returns the pages of a database that hold nothing.
func freePages(t testing.TB, file []byte) map[int]bool {
	t.Helper()
	free := map[int]bool{}
	path := filepath.Join(t.TempDir(), "db")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	db := must(bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true}))(t)
	err := db.View(func(tx *bolt.Tx) error {
		for id := range len(file) / os.Getpagesize() {
			if page, err := tx.Page(id); err != nil || page == nil || page.Type == "free" {
				free[id] = true
			}
		}
		return nil
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	return free
}

// overwrite writes into a file behind its user's back.
func overwrite(t *testing.T, path string, offset int64, b []byte) {
	t.Helper()
	f := must(os.OpenFile(path, os.O_WRONLY, 0))(t)
	_, err := f.WriteAt(b, offset)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// within fails the test when f takes longer.
func within(t *testing.T, limit time.Duration, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(limit):
		t.Fatalf("it hangs for %v", limit)
	}
}

// truth is what a database says.
type truth struct {
	revision   uint64
	workspaces map[string]Workspace
	values     map[string]map[string]string
}

func readAll(t testing.TB, h *harness) truth {
	t.Helper()
	all := truth{h.Revision(), map[string]Workspace{}, map[string]map[string]string{}}
	ws, _, err := h.ListWorkspaces("", 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range ws {
		all.workspaces[w.ID] = w
		all.values[w.ID] = h.values(w.ID)
	}
	return all
}

// checkTruth makes all kinds of calls: each fails, which is counted, or says
// what is true.
func checkTruth(t *testing.T, h *harness, what string, want truth) (failures int) {
	t.Helper()
	failed := func(err error) bool {
		var paniced *PanicError
		if errors.As(err, &paniced) && paniced.Damage == "" {
			t.Errorf("%s: a panic of another cause: %v\n%s", what, err, paniced.Stack)
		}
		if err != nil {
			failures++
		}
		return err != nil
	}
	// bbolt ends a list where a page's count leads it astray. Nothing in it is
	// wrong.
	ws, _, err := h.ListWorkspaces("", 0, nil)
	failed(err)
	page, err := h.Feed(0, 0)
	failed(err)
	for _, e := range page.Entries {
		ws = append(ws, *e.Workspace)
	}
	for _, w := range ws {
		if diff := cmp.Diff(want.workspaces[w.ID], w); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	for id, w := range want.workspaces {
		if got, err := h.Workspace(id); !failed(err) {
			if diff := cmp.Diff(w, got); diff != "" {
				t.Errorf("%s: %s", what, diff)
			}
		}
		snapshot, err := h.Snapshot(id)
		if failed(err) {
			continue
		}
		values := map[string]string{}
		for _, s := range snapshot.Secrets {
			values[s.Key] = s.Value.Reveal()
		}
		if diff := cmp.Diff(want.values[id], values); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	deadline, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, id := range []string{"w00", "w05", "w11"} {
		_, err := h.RestartWorkspace(deadline, id, Options{})
		failed(err)
		_, err = h.UpdateSecrets(deadline, in(id), set("NEW", strings.Repeat("n", 5000)), Options{})
		failed(err)
	}
	_, err = h.CreateWorkspace(deadline, NewWorkspace{ID: "new"}, Options{})
	failed(err)
	failed(h.Ping(deadline))
	return failures
}

// A file that is cut off while it is open gives errors, at once, and Ping tells
// of it. The next start refuses it.
func TestTruncatedFile_WhileRunning(t *testing.T) {
	for _, left := range []float64{0, 0.1, 0.5} {
		t.Run(fmt.Sprint(left), func(t *testing.T) {
			log := &logBuffer{}
			h := filled(t)
			h.cfg.Logger = log.logger()
			h.reopen()
			want := readAll(t, h)
			var used int64
			if err := h.view(func(tx *bolt.Tx) error { used = tx.Size(); return nil }); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(h.cfg.Path, int64(float64(used)*left)); err != nil {
				t.Fatal(err)
			}
			within(t, time.Minute, func() {
				if failures := checkTruth(t, h, "cut off", want); failures < len(want.workspaces) {
					t.Errorf("only %d calls have failed", failures)
				}
				_, err := h.Workspace("w00")
				if left == 0 && (!errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "restart to have it checked")) {
					t.Errorf("got %v", err)
				}
				if err := h.Ping(ctx); left == 0 && !errors.Is(err, ErrDamaged) {
					t.Errorf("Ping: got %v", err)
				}
				_ = h.Close()
				refused(t, h.cfg, ErrDamaged)
			})
			if lines := log.take(); left == 0 && (len(lines) != 1 || !strings.Contains(lines[0], "the file was cut off, or the disk fails")) {
				t.Errorf("logged: %q", lines)
			}
		})
	}
}

// Who removes or replaces the file while it is open can put it back: until then
// nothing is acknowledged that would be lost.
func TestReplacedFile_WhileRunning(t *testing.T) {
	for name, remove := range map[string]func(t *testing.T, path string){
		"removed": func(*testing.T, string) {},
		"replaced": func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte("another"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.create("a", value("K", "1"))
			h.record.take()
			if err := os.Rename(h.cfg.Path, h.cfg.Path+".away"); err != nil {
				t.Fatal(err)
			}
			remove(t, h.cfg.Path)
			for range 2 {
				_, err := h.UpdateSecrets(ctx, in("a"), set("K", "2"), Options{})
				if err == nil || !strings.Contains(err.Error(), "was removed or replaced") {
					t.Errorf("got %v", err)
				}
			}
			if h.values("a")["K"] != "1" || h.record.take() != nil {
				t.Errorf("got %v", h.values("a"))
			}
			if err := os.Rename(h.cfg.Path+".away", h.cfg.Path); err != nil {
				t.Fatal(err)
			}
			must(h.UpdateSecrets(ctx, in("a"), set("K", "3"), Options{}))(t)
			h.reopen()
			if h.values("a")["K"] != "3" {
				t.Errorf("got %v", h.values("a"))
			}
		})
	}
}

// After a commit in doubt nothing is written before that one is made sure of.
func TestCommitInDoubt_IsSettledFirst(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	doubt := func() {
		t.Helper()
		h.around = func(_ context.Context, _ string, do func(context.Context) error) error {
			return errors.Join(do(ctx), errors.New("sync"))
		}
		if _, err := h.RestartWorkspace(ctx, "a", Options{}); !errors.Is(err, ErrInDoubt) {
			t.Fatal(err)
		}
		h.around = nil
	}
	doubt()
	file := h.file
	h.file = must(os.Open(h.cfg.Path))(t) // which can't be written to
	for range 2 {
		if _, err := h.RestartWorkspace(ctx, "a", Options{}); err == nil || !strings.Contains(err.Error(), "an earlier commit can't be made sure of") {
			t.Errorf("got %v", err)
		}
	}
	if err := h.file.Close(); err != nil {
		t.Error(err)
	}
	h.file = file
	before := must(os.ReadFile(h.cfg.Path))(t)
	if err := h.settle(); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(before, must(os.ReadFile(h.cfg.Path))(t)) {
		t.Error("the file has changed")
	}
	if r := must(h.RestartWorkspace(ctx, "a", Options{}))(t); r.Workspace.Generation != 3 {
		t.Errorf("generation %d", r.Workspace.Generation)
	}
	h.reopen()

	// One that the disk has lost in the end, as the page cache will show some day.
	metas := must(os.ReadFile(h.cfg.Path))(t)[:2*h.pageSize]
	doubt()
	overwrite(t, h.cfg.Path, 0, metas)
	for range 2 {
		if _, err := h.RestartWorkspace(ctx, "a", Options{}); !errors.Is(err, ErrDamaged) {
			t.Errorf("got %v", err)
		}
	}
	if err := h.Ping(ctx); !errors.Is(err, ErrDamaged) {
		t.Errorf("Ping: got %v", err)
	}
	h.reopen()
	if w := must(h.Workspace("a"))(t); w.Generation != 3 {
		t.Errorf("generation %d", w.Generation)
	}
	must(h.RestartWorkspace(ctx, "a", Options{}))(t)
}

// A meta page that is torn is told of.
func TestOpen_TornMetaIsLogged(t *testing.T) {
	h := filled(t)
	h.close()
	overwrite(t, h.cfg.Path, 16+48, []byte{0xff}) // its transaction id
	log := &logBuffer{}
	h.cfg.Logger = log.logger()
	h.open()
	if lines := log.take(); len(lines) != 1 || !strings.Contains(lines[0], "level=WARN") || !strings.Contains(lines[0], "is torn") {
		t.Errorf("logged: %q", lines)
	}
}
