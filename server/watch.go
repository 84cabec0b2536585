package server

import (
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// watchPageSize is how many workspaces a watch reads at once, in one
// transaction that has ended before the first of them is sent. A watch whose
// client does not read holds a page for as long, perhaps alone.
const watchPageSize = 16

// position is where a watch is: what resume_token holds.
type position struct {
	// Instance is the database's: positions of another one mean nothing.
	Instance string `json:"d"`
	// Since and Revision are those of store.FeedSince: everything up to Revision
	// was sent, to a client that began from nothing at Since.
	Since    uint64 `json:"s"`
	Revision uint64 `json:"r"`
}

// watch is one WatchWorkspaces call. It has no queue: it reads the change feed,
// which holds the newest state of each workspace, at its client's own pace, and
// shares what it reads with watches at the same place.
type watch struct {
	server *Server
	stream grpc.ServerStreamingServer[workspacev1.WatchWorkspacesResponse]
	view   access.View
	// match is what the filter chooses of the view; nil: everything.
	match func(*store.Workspace) bool
	hint  <-chan struct{}
	pos   position
	// resumed: the client knows workspaces that this stream has not sent.
	resumed bool
	// shown is kept with a match only: by uid whether the workspace was last
	// sent to the client as itself, or as removed.
	shown map[string]bool
}

// WatchWorkspaces implements workspace.v1.WorkspaceControl. A client that
// resumes with a filter gets `removed` also for a workspace that it never saw,
// when it changed and does not match: the server does not know. That must not tell
// of workspaces that the client may not see: of others' names nothing is sent, and
// where labels decide, which may have been others before, a resumed watch begins
// anew.
//
// INVALID_ARGUMENT, UNAVAILABLE.
func (s *Server) WatchWorkspaces(req *workspacev1.WatchWorkspacesRequest, stream grpc.ServerStreamingServer[workspacev1.WatchWorkspacesResponse]) error {
	f, err := parseFilter(req.GetFilter())
	if err != nil {
		return err
	}
	view := s.view(stream.Context(), workspacev1.WorkspaceControl_WatchWorkspaces_FullMethodName)
	w := &watch{server: s, stream: stream, view: view, match: visible(f, view)}
	if token := req.GetResumeToken(); token != "" {
		w.resumed = true
		if !decodeToken(token, &w.pos, "watch") {
			return invalid("resume_token", "must be the resume_token of a response of WatchWorkspaces, or empty")
		}
	}
	// Before the first read, or a change between is missed.
	hint, stop := s.hub.Watch("")
	defer stop()
	w.hint = hint
	return w.run()
}

// run returns when the stream has to end.
func (w *watch) run() error {
	if !w.resumed {
		w.restart()
	} else if w.pos.Instance != w.server.store.InstanceUID() || w.view.ByLabel() {
		if err := w.resync(); err != nil {
			return err
		}
	}
	for {
		err := w.follow()
		if !errors.Is(err, store.ErrCompacted) {
			return err
		}
		if err := w.resync(); err != nil {
			return err
		}
	}
}

// restart begins with everything that is there.
func (w *watch) restart() {
	w.resumed, w.shown = false, nil
	w.pos = position{Instance: w.server.store.InstanceUID(), Since: w.server.store.Revision()}
}

// resync tells the client to forget everything, and begins anew.
func (w *watch) resync() error {
	w.restart()
	return w.send(&workspacev1.WatchWorkspacesResponse{Event: &workspacev1.WatchWorkspacesResponse_Resync{
		Resync: &workspacev1.ResyncMarker{},
	}})
}

// follow sends what comes after the position, and once nothing is left the sync
// marker, until the stream has to end or the feed no longer reaches back to the
// position.
func (w *watch) follow() error {
	for synced := false; ; {
		page, err := w.server.feed.since(w.pos)
		if err != nil {
			return err
		}
		for i := range page.Entries {
			if err := w.entry(&page.Entries[i], page.frames[i]); err != nil {
				return err
			}
		}
		w.pos.Revision = page.Next
		if page.More {
			continue
		}
		w.pos.Since = page.Next
		if !synced {
			synced = true
			if err := w.send(&workspacev1.WatchWorkspacesResponse{Event: &workspacev1.WatchWorkspacesResponse_Synced{
				Synced: &workspacev1.SyncMarker{SyncTime: timestamppb.Now()},
			}}); err != nil {
				return err
			}
		}
		select {
		case <-w.hint:
		case <-w.server.draining:
			return errDraining
		case <-w.stream.Context().Done():
			return w.stream.Context().Err()
		}
	}
}

// entry sends a change, as itself or as a removal, if its client has to know.
func (w *watch) entry(e *store.FeedEntry, itself func() (frame, error)) error {
	w.pos.Revision = e.Revision
	switch {
	case e.Workspace == nil:
		if !w.view.ShowsID(e.RemovedID) {
			return nil
		}
		shown, known := w.shown[e.RemovedUID]
		delete(w.shown, e.RemovedUID)
		if w.match != nil && !shown && (known || !w.resumed) {
			return nil
		}
		return w.sendFrame(itself())
	case !w.view.ShowsID(e.Workspace.ID):
		return nil
	case w.match == nil || w.match(e.Workspace):
		w.mark(e.Workspace.UID, true)
		return w.sendFrame(itself())
	}
	shown, known := w.shown[e.Workspace.UID]
	if !shown && (known || !w.resumed) {
		return nil
	}
	if w.resumed {
		w.mark(e.Workspace.UID, false)
	} else {
		delete(w.shown, e.Workspace.UID)
	}
	return w.send(removedEvent(e.Workspace.ID, e.Workspace.UID))
}

func (w *watch) mark(uid string, shown bool) {
	if w.match == nil {
		return
	}
	if w.shown == nil {
		w.shown = make(map[string]bool)
	}
	w.shown[uid] = shown
}

func (w *watch) send(resp *workspacev1.WatchWorkspacesResponse) error {
	return w.sendFrame(encodeResponse(resp, w.pos))
}

// sendFrame may block for as long as the client doesn't read. It holds nothing
// that anybody else waits for.
func (w *watch) sendFrame(f frame, err error) error {
	if w.server.isDraining() {
		return errDraining
	}
	if err != nil {
		return err
	}
	return w.stream.SendMsg(f)
}
