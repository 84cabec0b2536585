package server

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/store"
)

// pages is a store whose feed has one workspace, and notes how it is read.
type pages struct {
	Store
	mu       sync.Mutex
	revision uint64
	reads    []string
	err      error
	hold     chan struct{} // nil, or a read of place 1 waits for it
}

func (p *pages) InstanceUID() string { return "instance" }

func (p *pages) Revision() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.revision
}

func (p *pages) FeedSince(since, after uint64, _ int) (store.FeedPage, error) {
	if after == 1 && p.hold != nil {
		<-p.hold
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reads = append(p.reads, fmt.Sprintf("%d/%d at %d", since, after, p.revision))
	if p.err != nil {
		return store.FeedPage{}, p.err
	}
	return store.FeedPage{Entries: []store.FeedEntry{{Revision: p.revision, Workspace: &store.Workspace{ID: "a"}}}, Next: p.revision}, nil
}

// TestFeedIsSharedAtAPlace: who stands at the same place shares what is read, as
// long as nothing newer was committed.
func TestFeedIsSharedAtAPlace(t *testing.T) {
	st := &pages{revision: 5}
	f := &feed{store: st}
	at := func(since, after uint64) *feedPage {
		t.Helper()
		page, err := f.since(position{Instance: "instance", Since: since, Revision: after})
		if err != nil {
			t.Fatal(err)
		}
		return page
	}
	want := func(reads ...string) {
		t.Helper()
		if diff := cmp.Diff(reads, st.reads); diff != "" {
			t.Error(diff)
		}
		st.reads = nil
	}
	first := at(4, 4)
	for range 100 {
		if at(4, 4) != first {
			t.Error("another page at the same place")
		}
	}
	want("4/4 at 5")

	at(4, 3)
	at(3, 3)
	at(4, 4)
	want("4/3 at 5", "3/3 at 5")

	st.revision = 6 // what was read before may lack what its watches were told of
	if got := at(4, 4).Next; got != 6 {
		t.Errorf("a page from before the newest commit, up to %d", got)
	}
	want("4/4 at 6")

	for i := range uint64(len(f.pages)) {
		at(10, i)
	}
	st.reads = nil
	at(4, 4)
	want("4/4 at 6") // no more than the newest few are kept
}

// TestFeedKeepsNoError: a read that failed is tried again.
func TestFeedKeepsNoError(t *testing.T) {
	broken := errors.New("broken")
	st := &pages{revision: 5, err: broken}
	f := &feed{store: st}
	pos := position{Instance: "instance", Since: 4, Revision: 4}
	for range 2 {
		if _, err := f.since(pos); !errors.Is(err, broken) {
			t.Errorf("error %v", err)
		}
	}
	st.err = nil
	if _, err := f.since(pos); err != nil {
		t.Error(err)
	}
	if len(st.reads) != 3 {
		t.Errorf("%d reads, want 3", len(st.reads))
	}
}

// TestFeedReadHoldsUpNoOtherPlace: a read that takes long holds up those at its
// own place only.
func TestFeedReadHoldsUpNoOtherPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &pages{revision: 5, hold: make(chan struct{})}
		f := &feed{store: st}
		read := func(after uint64) {
			if _, err := f.since(position{Instance: "instance", Since: after, Revision: after}); err != nil {
				t.Error(err)
			}
		}
		var held sync.WaitGroup
		held.Go(func() { read(1) })
		synctest.Wait()
		read(2)
		close(st.hold)
		held.Wait()
		if diff := cmp.Diff([]string{"2/2 at 5", "1/1 at 5"}, st.reads); diff != "" {
			t.Error(diff)
		}
	})
}
