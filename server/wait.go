package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// WaitWorkspace implements workspace.v1.WorkspaceControl. Both conditions are
// met once a container of the generation was started: no workspace has a
// readiness probe.
//
// A workspace whose retries are exhausted is waited for in vain, also for a
// generation that was started: RETRIES_EXHAUSTED.
//
// INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, DEADLINE_EXCEEDED,
// UNAVAILABLE.
func (s *Server) WaitWorkspace(ctx context.Context, req *workspacev1.WaitWorkspaceRequest) (*workspacev1.WaitWorkspaceResponse, error) {
	id, err := parseWorkspaceName("name", req.GetName())
	if err != nil {
		return nil, err
	}
	call := ctx
	ctx, cancel := context.WithDeadline(ctx, answerBy(ctx))
	defer cancel()
	hint, stop := s.hub.Watch(id) // before the first read, or a change between is missed
	defer stop()

	w, err := s.store.Workspace(id)
	if err != nil {
		return nil, err
	}
	uid, generation := w.UID, req.GetGeneration()
	switch {
	case generation == 0:
		generation = w.Generation
	case generation > w.Generation:
		return nil, invalid("generation", "must be one that exists: the newest of %s is %d", req.GetName(), w.Generation)
	}
	for {
		if err := s.checkRead(ctx, workspacev1.WorkspaceControl_WaitWorkspace_FullMethodName, &w); err != nil {
			return nil, err
		}
		done, err := waitOver(&w, generation)
		if err != nil {
			return nil, err
		}
		if done {
			return &workspacev1.WaitWorkspaceResponse{Workspace: s.show(ctx, &w)}, nil
		}
		select {
		case <-hint:
		case <-s.draining:
			return nil, errDraining
		case <-ctx.Done():
			if err := call.Err(); errors.Is(err, context.Canceled) {
				return nil, err
			}
			return nil, stillWaiting(&w, generation)
		}
		w, err = s.store.Workspace(id)
		switch {
		case errors.Is(err, store.ErrNotFound), err == nil && w.UID != uid:
			return nil, deletedError(id)
		case err != nil:
			return nil, err
		}
	}
}

// answerMargin is how long before its caller's deadline a wait answers: after it
// nobody listens.
const answerMargin = 250 * time.Millisecond

func answerBy(ctx context.Context) time.Time {
	now := time.Now()
	latest := now.Add(MaxWait)
	if deadline, ok := ctx.Deadline(); ok && deadline.Before(latest) {
		return deadline.Add(-min(answerMargin, deadline.Sub(now)/10))
	}
	return latest
}

// stillWaiting tells a caller whose time is up what the workspace waits for.
func stillWaiting(w *store.Workspace, generation int64) error {
	state, _ := workspace.StateOf(w)
	message := fmt.Sprintf("%s has not reached generation %d yet: it is %s", workspaceName(w.ID), generation, state)
	metadata := map[string]string{"resource": workspaceName(w.ID), "state": string(state)}
	if f := w.Status.Failure; f != nil {
		message += fmt.Sprintf(", attempt %d failed: %s: %s", f.Attempt, f.Reason, f.Message)
		metadata["reason"] = f.Reason
	}
	return &apiError{code: codes.DeadlineExceeded, reason: ReasonStillWaiting, message: message, metadata: metadata}
}

// waitOver reports whether the generation has come about, or why it won't
// unless somebody changes something.
func waitOver(w *store.Workspace, generation int64) (bool, error) {
	failure := w.Status.Failure
	switch {
	case !w.Pending() && !w.Parked && w.Deleting == nil && w.End() == store.EndExhausted:
		return false, exhaustedError(w)
	case w.Status.ObservedGeneration >= generation:
		return true, nil
	case w.Deleting != nil:
		return false, precondition(ReasonWorkspaceDeleting, workspaceName(w.ID), "is being deleted")
	case w.Parked:
		return false, precondition(ReasonWorkspaceStopped, workspaceName(w.ID), "is stopped; StartWorkspace starts it")
	case !w.Pending() && w.End() == store.EndExited:
		return false, precondition(ReasonWorkspaceExited, workspaceName(w.ID),
			"has ended, and its crash policy does not start it again: the next start has the change; StartWorkspace starts it")
	case failure != nil && failure.NextAttempt.IsZero() && failure.Generation >= w.Generation && w.Status.StartingGeneration == 0:
		e := precondition(ReasonWorkspaceFailed, workspaceName(w.ID),
			fmt.Sprintf("can't start generation %d and will not try again before a change: %s: %s", failure.Generation, failure.Reason, failure.Message))
		e.metadata["reason"] = failure.Reason
		return false, e
	}
	return false, nil
}

// exhaustedError: the generation was started, did not stay, and is not tried
// again.
func exhaustedError(w *store.Workspace) error {
	message := fmt.Sprintf("has ended %d times in a row, and its crash policy allows %d retries: change or restart it",
		w.Status.Crashes.InARow, w.Spec.CrashPolicy.MaxRetries)
	if f := w.Status.Failure; f != nil {
		message += ": " + f.Message
	}
	e := precondition(ReasonRetriesExhausted, workspaceName(w.ID), message)
	e.metadata["state"] = string(store.EndExhausted)
	return e
}

func deletedError(id string) error {
	var e *apiError
	errors.As(notFoundError(&store.NotFoundError{WorkspaceID: id}), &e)
	e.code, e.reason = codes.NotFound, ReasonWorkspaceDeleted
	e.message = fmt.Sprintf("workspace %q was deleted meanwhile", id)
	return e
}
