package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

// A row that is garbage is found at the start, and named.
func TestContract23_DamagedRows(t *testing.T) {
	h := filled(t)
	h.create("gone")
	h.remove("gone")
	rows := dump(t, h.db)
	good := h.closeAndRead()

	garbage := []string{"", "x", "null", "{}", "[]", `"text"`, `{"id":7}`, `{"id":"another"}`, "12345678", strings.Repeat("{", 1000)}
	for bucket, some := range map[string][]string{
		"workspaces":         {"w03"},
		"feed":               {string(number(1))},
		"removed":            {lastKey(rows["removed"])},
		"owners":             {globalOwner},
		"requests":           {"id"},
		"requests_by_expiry": {"short"},
		"meta":               {"revision", "tombstones", "requests", "schema"},
	} {
		for _, key := range some {
			for i, value := range garbage {
				if rows[bucket][key] == value || bucket == "removed" && len(value) == 8 || bucket == "meta" && len(value) == 8 || bucket == "owners" && value[:min(1, len(value))] == "{" {
					continue // makes sense
				}
				t.Run(fmt.Sprintf("%s %q %d", bucket, key, i), func(t *testing.T) {
					cfg := h.cfg
					cfg.Path = filepath.Join(t.TempDir(), "workspaced.db")
					if err := os.WriteFile(cfg.Path, good, 0o600); err != nil {
						t.Fatal(err)
					}
					editFile(t, cfg.Path, func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Put([]byte(key), []byte(value)) })
					refused(t, cfg, ErrDamaged)
				})
			}
		}
	}
}

// A row that the disk has lost is missed, whoever it was.
func TestContract23_LostRows(t *testing.T) {
	h := filled(t)
	h.create("gone")
	h.remove("gone")
	must(h.UpdateSecrets(ctx, in("w03"), SecretsUpdate{Delete: []string{"L"}}, Options{}))(t)
	rows := dump(t, h.db)
	good := h.closeAndRead()
	for bucket := range rows {
		if len(rows[bucket]) == 0 {
			continue
		}
		for _, key := range []string{firstKey(rows[bucket]), lastKey(rows[bucket])} {
			if bucket == "meta" && key != "tombstones" || bucket == "requests_by_expiry" {
				continue // not a list
			}
			t.Run(fmt.Sprintf("%s %q", bucket, key), func(t *testing.T) {
				cfg := h.cfg
				cfg.Path = filepath.Join(t.TempDir(), "workspaced.db")
				if err := os.WriteFile(cfg.Path, good, 0o600); err != nil {
					t.Fatal(err)
				}
				editFile(t, cfg.Path, func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Delete([]byte(key)) })
				refused(t, cfg, ErrDamaged)
			})
		}
	}
}

func firstKey(rows map[string]string) string { return slices.Sorted(maps.Keys(rows))[0] }

func lastKey(rows map[string]string) string {
	keys := slices.Sorted(maps.Keys(rows))
	return keys[len(keys)-1]
}

// editFile changes rows of a database that is closed.
func editFile(t *testing.T, path string, f func(*bolt.Tx) error) {
	t.Helper()
	db := must(bolt.Open(path, 0o600, nil))(t)
	if err := errors.Join(db.Update(f), db.Close()); err != nil {
		t.Fatal(err)
	}
}

// Garbage in a row that is found while running is an error that names bucket and
// key; nothing else is harmed.
func TestDamagedRow_WhileRunning(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("K", "1"))
	h.create("b", value("K", "2"))
	must(h.RestartWorkspace(ctx, "b", request("id", "one")))(t)
	put := func(bucket []byte, key, value string) {
		h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Put([]byte(key), []byte(value)) })
	}
	want := func(err error, bucket, key string) {
		t.Helper()
		var row *RowError
		if !errors.As(err, &row) || row.Bucket != bucket || row.Key != key || !errors.Is(err, ErrDamaged) {
			t.Errorf("got %v, want one that names %s in %s", err, key, bucket)
		}
	}
	good := dump(t, h.db)

	for _, garbage := range []string{"", "null", `{"id":"b","uid":"x","generation":1,"revision":1}`} {
		put(bucketWorkspaces, "a", garbage)
		_, err := h.Workspace("a")
		want(err, "workspaces", "a")
		_, err = h.Snapshot("a")
		want(err, "workspaces", "a")
		_, err = h.RestartWorkspace(ctx, "a", Options{})
		want(err, "workspaces", "a")
		_, _, err = h.ListWorkspaces("", 0, nil)
		want(err, "workspaces", "a")
		_, err = h.UpdateSecrets(ctx, Scope{}, set("G", "1"), Options{})
		want(err, "workspaces", "a")
		must(h.RestartWorkspace(ctx, "b", Options{}))(t)
	}
	put(bucketWorkspaces, "a", good["workspaces"]["a"])

	put(bucketFeed, string(number(1)), `{"id":"c"}`)
	_, err := h.Feed(0, 0)
	want(err, "feed", string(number(1)))
	put(bucketFeed, string(number(1)), good["feed"][string(number(1))])

	// A request that was remembered is in nobody's way, and goes.
	put(bucketRequests, "id", "{")
	_, err = h.RestartWorkspace(ctx, "b", request("id", "one"))
	want(err, "requests", "id")
	put(bucketRequestsByExpiry, "short", "")
	h.clock.Add(2 * requestAge)
	must(h.RestartWorkspace(ctx, "b", Options{}))(t)
	must(h.RestartWorkspace(ctx, "b", request("id", "two")))(t)
	if rows := dump(t, h.db); len(rows["requests"]) != 1 || len(rows["requests_by_expiry"]) != 1 {
		t.Errorf("%d requests, %d ends are left", len(rows["requests"]), len(rows["requests_by_expiry"]))
	}

	put(bucketMeta, "revision", "short")
	_, err = h.RestartWorkspace(ctx, "b", Options{})
	want(err, "meta", "revision")
	_, err = h.RestartWorkspace(ctx, "b", Options{ValidateOnly: true})
	want(err, "meta", "revision")
	put(bucketMeta, "revision", good["meta"]["revision"])
}

// A secret whose row is garbage is like one that can't be opened: it is named,
// nobody else's, and setting or deleting it heals it, after a restart as well.
func TestSecrets_DamagedRow(t *testing.T) {
	garbage := map[string]string{
		"none": "", "no JSON": "{", "null": "null", "nothing": "{}", "another kind": `{"version":"1"}`,
		"no version": `{"version":0,"size":1}`, "negative": `{"version":1,"size":-1}`,
	}
	heals := map[string]struct {
		do   func(h *harness, scope Scope) (Result, error)
		want map[string]string
	}{
		"set": {func(h *harness, scope Scope) (Result, error) {
			return h.UpdateSecrets(ctx, scope, set("K", "old"), Options{})
		}, map[string]string{"K": "old", "L": "2"}},
		"set another value": {func(h *harness, scope Scope) (Result, error) {
			return h.UpdateSecrets(ctx, scope, set("K", "longer than it was"), Options{})
		}, map[string]string{"K": "longer than it was", "L": "2"}},
		"delete": {func(h *harness, scope Scope) (Result, error) {
			return h.UpdateSecrets(ctx, scope, SecretsUpdate{Delete: []string{"K"}, MustExist: true}, Options{})
		}, map[string]string{"L": "2"}},
	}
	for _, scope := range []Scope{{}, in("a")} {
		for what, row := range garbage {
			for how, heal := range heals {
				for _, restart := range []bool{false, true} {
					t.Run(fmt.Sprint(scope, " ", what, ", ", how, ", ", restart), func(t *testing.T) {
						h := newHarness(t)
						o := ownerOf(ptr(h.create("a")))
						h.create("b", value("K", "own"), value("L", "own"))
						if scope.Global() {
							o = owner{}
						}
						must(h.UpdateSecrets(ctx, scope, set("K", "old", "L", "2"), Options{}))(t)
						h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketSecrets).Put(o.row("K"), []byte(row)) })
						if restart {
							h.reopen()
						}

						var key *KeyError
						if s, err := h.Snapshot("a"); !errors.As(err, &key) || key.Key != "K" || !errors.Is(err, ErrUnreadable) || len(s.Secrets) != 0 {
							t.Errorf("got %v, %v", s, err)
						}
						if _, err := h.Secret(scope, "K"); !errors.As(err, &key) || key.Key != "K" || !errors.Is(err, ErrUnreadable) {
							t.Errorf("got %v", err)
						}
						if diff := cmp.Diff(map[string]string{"K": "own", "L": "own"}, h.values("b")); diff != "" {
							t.Error(diff)
						}
						secrets, _, err := h.ListSecrets(scope, "", 0)
						if err != nil || len(secrets) != 2 || secrets[0].Key != "K" || secrets[0].Version != 0 || secrets[0].Size != 3 || secrets[1].Version != 1 {
							t.Errorf("the list is %+v, %v", secrets, err)
						}
						// Other keys of that owner can be set.
						must(h.UpdateSecrets(ctx, scope, set("L", "2+"), Options{}))(t)
						must(h.UpdateSecrets(ctx, scope, set("L", "2"), Options{}))(t)

						before := must(h.Workspace("a"))(t)
						r := must(heal.do(h, scope))(t)
						if after := must(h.Workspace("a"))(t); !r.Changed || after.Generation != before.Generation+1 {
							t.Errorf("got %+v, generation %d after %d", r, after.Generation, before.Generation)
						}
						if diff := cmp.Diff(heal.want, h.values("a")); diff != "" {
							t.Error(diff)
						}
						checkSums(t, h, o)
						// No version that it may have had is used again.
						again := must(h.UpdateSecrets(ctx, scope, set("K", "newer"), Options{}))(t)
						if v := again.Secrets[0].Version; v < h.clock.Now().Unix() {
							t.Errorf("version %d", v)
						}
						h.reopen()
						if h.values("a")["K"] != "newer" {
							t.Errorf("got %v", h.values("a"))
						}
					})
				}
			}
		}
	}
}

// A secret whose row is garbage is no obstacle to its workspace's end.
func TestSecrets_DamagedRowIsRemoved(t *testing.T) {
	h := newHarness(t)
	o := ownerOf(ptr(h.create("a", value("K", "1"), value("L", "2"))))
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketSecrets).Put(o.row("K"), []byte("x")) })
	h.remove("a")
	rows := dump(t, h.db)
	if n := len(rows["secrets"]) + len(rows["sealed"]) + len(rows["owners"]); n != 0 {
		t.Errorf("%d rows are left", n)
	}
	h.reopen()
}

// A deleted key's row that is garbage is none of a container's business.
func TestSecrets_DamagedRowOfDeletedKey(t *testing.T) {
	h := newHarness(t)
	o := ownerOf(ptr(h.create("a", value("K", "1"), value("L", "2"))))
	must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"K"}}, Options{}))(t)
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketSecrets).Put(o.row("K"), []byte("x")) })
	h.reopen()
	if diff := cmp.Diff(map[string]string{"L": "2"}, h.values("a")); diff != "" {
		t.Error(diff)
	}
	r := must(h.UpdateSecrets(ctx, in("a"), set("K", "3"), Options{}))(t)
	if r.Secrets[0].Version < h.clock.Now().Unix() || h.values("a")["K"] != "3" {
		t.Errorf("got %+v", r)
	}
	checkSums(t, h, o)
}

// A secret that vanished while running is missed.
func TestContract18_MissingSecret(t *testing.T) {
	h := newHarness(t)
	o := ownerOf(ptr(h.create("a", value("K", "1"), value("L", "2"))))
	h.edit(func(tx *bolt.Tx) error {
		return errors.Join(tx.Bucket(bucketSecrets).Delete(o.row("L")), tx.Bucket(bucketSealed).Delete(o.row("L")))
	})
	if s, err := h.Snapshot("a"); !errors.Is(err, ErrDamaged) || len(s.Secrets) != 0 {
		t.Errorf("got %+v, %v", s, err)
	}
}

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
func freePages(t *testing.T, file []byte) map[int]bool {
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
	workspaces map[string]Workspace
	values     map[string]map[string]string
}

func readAll(t *testing.T, h *harness) truth {
	t.Helper()
	all := truth{map[string]Workspace{}, map[string]map[string]string{}}
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
