package server

import (
	"context"
	"log/slog"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// fetchStore has one workspace with a secret.
type fetchStore struct {
	auditStore
	w   store.Workspace
	err error // of Snapshot
}

func (f *fetchStore) Workspace(string) (store.Workspace, error) { return f.w, nil }
func (f *fetchStore) Snapshot(string) (store.Snapshot, error) {
	return store.Snapshot{Workspace: f.w, Secrets: []store.OpenedSecret{{Key: "K", Version: 1, Value: seal.New([]byte("v"))}}}, f.err
}

type noHub struct{}

func (noHub) Watch(string) (<-chan struct{}, func()) { return nil, func() {} }

// Whatever is not as it has to be: no values.
func TestFetchSecrets_FailsClosed(t *testing.T) {
	running := func() store.Workspace {
		return store.Workspace{ID: "a", UID: "u", Status: store.Status{Running: &store.Running{InstanceID: "i", TokenHash: "h"}}}
	}
	for name, test := range map[string]struct {
		edit func(*fetchStore)
		code codes.Code
	}{
		"all is well":         {func(*fetchStore) {}, codes.OK},
		"no audit entry":      {func(f *fetchStore) { f.auditStore.err = store.ErrDiskFull }, codes.ResourceExhausted},
		"a secret unreadable": {func(f *fetchStore) { f.err = &store.KeyError{Key: "K", Err: store.ErrUnreadable} }, codes.FailedPrecondition},
		"another workspace":   {func(f *fetchStore) { f.w.UID = "other" }, codes.Unauthenticated},
		"another container":   {func(f *fetchStore) { f.w.Status.Running.InstanceID = "other" }, codes.Unauthenticated},
		"a container without": {func(f *fetchStore) { f.w.Status.Running.TokenHash = "" }, codes.Unauthenticated},
		"none runs":           {func(f *fetchStore) { f.w.Status.Running = nil }, codes.Unauthenticated},
		"parked":              {func(f *fetchStore) { f.w.Parked = true }, codes.FailedPrecondition},
		"deleting":            {func(f *fetchStore) { f.w.Deleting = &store.Deleting{} }, codes.FailedPrecondition},
		"started, not recorded": {func(f *fetchStore) {
			f.w.Status = store.Status{Token: &store.InstanceToken{InstanceID: "i", Hash: "h"}}
		}, codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fetchStore{w: running()}
			test.edit(f)
			s := New(Config{Store: f, Hub: noHub{}, Logger: slog.New(slog.DiscardHandler)})
			s.recordWait = 0
			ctx := access.WithSubject(context.Background(), access.Subject{Name: "workspace:a", Instance: &access.Instance{WorkspaceUID: "u", ID: "i"}})
			resp, err := s.FetchSecrets(ctx, &workspacev1.FetchSecretsRequest{Name: "workspaces/a"})
			if got := status.Code(s.mapError(ctx, err, nil)); got != test.code || (resp != nil) != (test.code == codes.OK) {
				t.Errorf("got %v, %v, want %v", resp, err, test.code)
			}
			if test.code == codes.OK && len(f.written) != 1 {
				t.Errorf("written: %v", f.written)
			}
		})
	}
}
