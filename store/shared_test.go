package store

import (
	"errors"
	"fmt"
	"maps"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

// checkShared checks that workspaces are shared as they are.
func checkShared(t testT, s *Store, ws []Workspace) {
	t.Helper()
	shared, more, err := s.ListShared("", 0, nil)
	if err != nil || more || len(shared) != len(ws) {
		t.Fatalf("%d shared workspaces of %d, more is %t, %v", len(shared), len(ws), more, err)
	}
	for i := range ws {
		if diff := cmp.Diff(ws[i], shared[i].Workspace); diff != "" {
			t.Error("in the list:", diff)
		}
		if diff := cmp.Diff(ws[i], must(s.SharedWorkspace(ws[i].ID))(t).Workspace); diff != "" {
			t.Error(diff)
		}
	}
}

// Readers share a workspace until its record changes; then each sees what there is
// now, and what the others have got stays as it was.
func TestShared(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	h.create("b")
	encoded := 0
	encode := func(w *Workspace) ([]byte, error) {
		encoded++
		return fmt.Append(nil, w.ID, w.Revision), nil
	}
	uid := must(h.Workspace("a"))(t).UID
	for name, change := range map[string]func() error{
		"secret": func() error { _, err := h.UpdateSecrets(ctx, in("a"), set("K", "1"), Options{}); return err },
		"global": func() error { _, err := h.UpdateSecrets(ctx, Scope{}, set("G", "1"), Options{}); return err },
		"status": func() error {
			_, err := h.UpdateStatus(ctx, "a", uid, func(_ Workspace, st *Status) { st.RestartCount++ })
			return err
		},
		"labels": func() error {
			_, err := h.UpdateWorkspace(ctx, "a", func(e *Editable) error { e.Labels = map[string]string{"k": "v"}; return nil }, Options{})
			return err
		},
		"stop": func() error { _, err := h.StopWorkspace(ctx, "a", Options{}); return err },
	} {
		before := must(h.SharedWorkspace("a"))(t)
		copied := before.Workspace
		encoding := must(before.Encoding(encode))(t)
		list, more, err := h.ListShared("", 1, nil)
		if err != nil || !more {
			t.Fatalf("more is %t, %v", more, err)
		}
		if again := must(h.SharedWorkspace("a"))(t); again != before || list[0] != before {
			t.Errorf("%s: a workspace that has not changed is another one", name)
		}
		encoded = 0
		if again := must(before.Encoding(encode))(t); encoded != 0 || string(again) != string(encoding) {
			t.Errorf("%s: encoded %d times more, as %q and %q", name, encoded, encoding, again)
		}
		if err := change(); err != nil {
			t.Fatal(name, err)
		}
		after := must(h.SharedWorkspace("a"))(t)
		if diff := cmp.Diff(must(h.Workspace("a"))(t), after.Workspace); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if got := string(must(after.Encoding(encode))(t)); after == before || got != fmt.Sprint("a", after.Revision) {
			t.Errorf("%s: encoded as %q", name, got)
		}
		if diff := cmp.Diff(copied, before.Workspace); diff != "" {
			t.Errorf("%s: who had it before has something else now: %s", name, diff)
		}
	}

	// The same id, another workspace; and none.
	must(h.DeleteWorkspace(ctx, "a", false, Options{}))(t)
	if err := h.FinishDeletion(ctx, "a", uid); err != nil {
		t.Fatal(err)
	}
	if w, err := h.SharedWorkspace("a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v, %v", w, err)
	}
	h.create("a")
	if w := must(h.SharedWorkspace("a"))(t); w.UID == uid || w.Generation != 1 {
		t.Errorf("got %+v", w.Workspace)
	}

	// A row that is damaged now is not hidden by what it was.
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketWorkspaces).Put([]byte("a"), []byte("garbage")) })
	if w, err := h.SharedWorkspace("a"); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, %v", w, err)
	}
	if ws, _, err := h.ListShared("", 0, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, %v", ws, err)
	}
}

// Who was told of a change reads it, whoever else reads at the same time.
func TestShared_NeverOld(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	var told atomic.Int64
	told.Store(1)
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for last := int64(0); last < 50; {
				want := told.Load()
				w, err := h.SharedWorkspace("a")
				if err != nil || w.Generation < max(want, last) {
					t.Errorf("generation %d after %d was told and %d was read, %v", w.Generation, want, last, err)
					return
				}
				last = w.Generation
				want = told.Load()
				ws, _, err := h.ListShared("", 1, nil)
				if err != nil || len(ws) != 1 || ws[0].Generation < max(want, last) {
					t.Errorf("got %v, %v after %d", ws, err, max(want, last))
					return
				}
				last = ws[0].Generation
			}
		})
	}
	for i := range 49 {
		r := must(h.UpdateSecrets(ctx, in("a"), set("K", fmt.Sprint(i)), Options{}))(t)
		told.Store(r.Workspace.Generation)
	}
	readers.Wait()
}

// What is kept is what was read last, and never more than it may be.
func TestSharing_Bound(t *testing.T) {
	var s sharing
	row := func(i int) []byte { return fmt.Append(nil, i, strings.Repeat("x", 3<<10)) }
	id := func(i int) []byte { return fmt.Append(nil, "w", i) }
	const n = 3 * sharedBytes / (8 << 10)
	largest := 0
	for i := range n {
		w := &Shared{Workspace: Workspace{ID: string(id(i))}, row: string(row(i))}
		s.keep(w, w)
		if s.get(id(0), row(0)) == nil && i < 10 {
			t.Errorf("the first one is gone after %d", i)
		}
		bytes := 0
		for _, m := range []map[string]*Shared{s.newer, s.older} {
			for _, w := range m {
				bytes += w.size()
			}
		}
		largest = max(largest, bytes)
	}
	if largest > sharedBytes || largest < sharedBytes*9/10 {
		t.Errorf("it had at most %d bytes, want about %d", largest, sharedBytes)
	}
	if s.get(id(0), row(0)) != nil || s.get(id(n-1), row(n-1)) == nil || s.get(id(n-1), row(0)) != nil {
		t.Error("the first one is there, or the last one is not, or not by its row")
	}
	// One that is read again and again stays.
	kept := s.get(id(n-1), row(n-1))
	for i := range n {
		s.keep(&Shared{Workspace: Workspace{ID: string(id(i))}, row: string(row(i)) + "2"})
		if s.get(id(n-1), row(n-1)) == kept {
			s.keep(kept)
		} else if i < n-1 {
			t.Fatalf("gone after %d", i)
		}
	}
}

// Who comes after one whose function has panicked gets an error, and no empty
// workspace.
func TestShared_EncodingPanics(t *testing.T) {
	w := &Shared{}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic is hidden")
			}
		}()
		_, _ = w.Encoding(func(*Workspace) ([]byte, error) { panic("in a test") })
	}()
	b, err := w.Encoding(func(*Workspace) ([]byte, error) { return []byte("encoded"), nil })
	if err == nil || b != nil {
		t.Errorf("got %q, %v", b, err)
	}
	if b, err := (&Shared{}).Encoding(func(*Workspace) ([]byte, error) { return []byte("encoded"), nil }); err != nil || string(b) != "encoded" {
		t.Errorf("got %q, %v", b, err)
	}
}

// What is said to be the size of a workspace is not less than what it takes, nor
// many times that, whatever it has most of.
func TestShared_Size(t *testing.T) {
	keys := func(n int, format string) map[string]string {
		m := map[string]string{}
		for i := range n {
			m[fmt.Sprintf(format, i)] = fmt.Sprint(i)
		}
		return m
	}
	versions := map[string]int64{}
	for i := range 1500 {
		versions[fmt.Sprint("K", i)] = 1
	}
	for name, w := range map[string]Workspace{
		"small":    {Spec: Spec{Image: "registry/image:tag", Env: keys(3, "A%d")}},
		"long":     {Spec: Spec{Command: []string{strings.Repeat("x", 40<<10)}}},
		"escaped":  {Spec: Spec{Command: []string{strings.Repeat("<", 5<<10)}, Env: keys(900, "A<%d")}},
		"versions": {Status: Status{Running: &Running{SecretVersions: versions}}},
		"global":   {Status: Status{Running: &Running{GlobalSecrets: slices.Sorted(maps.Keys(keys(1100, "G%d")))}}},
		"labels":   {Labels: keys(1800, "%d")},
		"last":     {Status: Status{LastGood: &LastGood{Spec: Spec{Env: keys(1000, "A%d"), Args: make([]string, 1100)}}}},
		"volumes":  {Spec: Spec{Volumes: make([]Volume, 1100)}},
	} {
		row := must(encodeRecord(&w))(t)
		if len(row) > maxSharedRow {
			t.Fatalf("%s: a row of %d bytes is not shared", name, len(row))
		}
		ws := make([]*Shared, 100)
		before := heap()
		for i := range ws {
			ws[i] = &Shared{row: string(row)}
			if err := decodeCoded(ws[i].row, &ws[i].Workspace); err != nil {
				t.Fatal(err)
			}
			_ = must(ws[i].Encoding(func(*Workspace) ([]byte, error) { return slices.Clone(row), nil }))(t)
		}
		took := (heap() - before) / len(ws)
		t.Logf("%s: a row of %d bytes takes %d, size is %d", name, len(row), took, ws[0].size())
		if size := ws[0].size(); size < took || size > 6*took {
			t.Errorf("%s: a row of %d bytes takes %d, and is said to take %d", name, len(row), took, size)
		}
		goruntime.KeepAlive(ws)
	}
}

// heap is how many bytes are in use.
func heap() int {
	var m goruntime.MemStats
	goruntime.GC()
	goruntime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// A long row is not kept, and does not take the place of what is.
func TestSharing_LongRows(t *testing.T) {
	var s sharing
	of := func(id string, n int) *Shared {
		return &Shared{Workspace: Workspace{ID: id}, row: id + strings.Repeat("x", n-len(id))}
	}
	kept := of("kept", maxSharedRow)
	s.keep(kept)
	for i := range 3 {
		long := of(fmt.Sprint("long", i), maxSharedRow+1+i*sharedBytes)
		s.keep(long)
		if s.get([]byte(long.ID), []byte(long.row)) != nil {
			t.Errorf("a row of %d bytes is kept", len(long.row))
		}
	}
	if s.newer["kept"] != kept {
		t.Error("another one is gone")
	}
}
