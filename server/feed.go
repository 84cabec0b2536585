package server

import (
	"fmt"
	"sync"

	"google.golang.org/protobuf/proto"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store"
)

// frame is an encoded WatchWorkspacesResponse. It is sent as it is, to as many as
// like, and never changed.
type frame []byte

// feedPage is a page of the change feed as one of the watchers reads it, and what
// each that stands at the same place sends of it.
type feedPage struct {
	store.FeedPage
	frames []func() (frame, error) // by entry: as itself, made for the first who asks
}

// feedPlace is what a page is of: the place of store.FeedSince, read when the
// newest commit was this one or a later one.
type feedPlace struct{ since, after, newest uint64 }

// feed reads the change feed for all watchers. Those that follow stand at the same
// place, or at one of few: what is read, converted and encoded for the first of
// them is there for all.
type feed struct {
	store Store

	mu    sync.Mutex
	pages [8]sharedPage // the newest few
	next  int           // of pages: the oldest
}

type sharedPage struct {
	place feedPlace
	read  func() (*feedPage, error)
}

// since is store.FeedSince as of now, for a watch that is there.
func (f *feed) since(pos position) (*feedPage, error) {
	// The revision comes first: a page may hold more than its place says, never
	// less. Who was told of a commit finds no page from before it.
	place := feedPlace{pos.Since, pos.Revision, f.store.Revision()}
	read := false
	defer func() {
		if !read { // also after a panic: who comes next tries again
			f.forget()
		}
	}()
	page, err := f.page(place)()
	read = err == nil
	return page, err
}

// page returns what reads the page, once for all who come while it is kept. The
// lock is not held meanwhile: watches at other places wait for nothing.
func (f *feed) page(place feedPlace) func() (*feedPage, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.pages {
		if p := &f.pages[i]; p.place == place && p.read != nil {
			return p.read
		}
	}
	read := sync.OnceValues(func() (*feedPage, error) { return f.read(place) })
	f.pages[f.next] = sharedPage{place, read}
	f.next = (f.next + 1) % len(f.pages)
	return read
}

func (f *feed) forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.pages[:])
}

func (f *feed) read(place feedPlace) (*feedPage, error) {
	page, err := f.store.FeedSince(place.since, place.after, watchPageSize)
	if err != nil {
		return nil, err
	}
	p := &feedPage{FeedPage: page}
	for i := range page.Entries {
		e := &page.Entries[i]
		pos := position{Instance: f.store.InstanceUID(), Since: place.since, Revision: e.Revision}
		p.frames = append(p.frames, sync.OnceValues(func() (frame, error) { return encodeEntry(e, pos) }))
	}
	return p, nil
}

// encodeEntry encodes an entry as itself: the workspace, or that it was removed.
func encodeEntry(e *store.FeedEntry, pos position) (frame, error) {
	if e.Workspace == nil {
		return encodeResponse(removedEvent(e.RemovedID, e.RemovedUID), pos)
	}
	return encodeResponse(&workspacev1.WatchWorkspacesResponse{Event: &workspacev1.WatchWorkspacesResponse_Workspace{
		Workspace: workspaceToProto(e.Workspace),
	}}, pos)
}

func removedEvent(id, uid string) *workspacev1.WatchWorkspacesResponse {
	return &workspacev1.WatchWorkspacesResponse{Event: &workspacev1.WatchWorkspacesResponse_Removed{
		Removed: &workspacev1.RemovedWorkspace{Name: workspaceName(id), Uid: uid},
	}}
}

// encodeResponse adds the token of the position behind which the client goes on.
func encodeResponse(resp *workspacev1.WatchWorkspacesResponse, pos position) (frame, error) {
	resp.ResumeToken = encodeToken(pos, "watch")
	b, err := proto.Marshal(resp)
	if err != nil {
		return nil, fmt.Errorf("marshal an event: %w", err)
	}
	return b, nil
}
