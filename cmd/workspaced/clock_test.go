package main

import (
	"context"
	"testing"
	"time"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
	"github.com/workspaced/workspaced/store"
)

// The clock is set back by a year between two runs of the daemon. What the first
// one wrote down for a minute later is not waited for that long, and changes go
// on.
func TestClockSetBack(t *testing.T) {
	in := newInstance(t)
	in.fill()
	ahead := time.Now().AddDate(1, 0, 0)
	st := in.open(func() time.Time { return ahead })
	w, err := st.CreateWorkspace(t.Context(), store.NewWorkspace{ID: "due", Spec: store.Spec{Image: testImage}}, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = st.UpdateStatus(t.Context(), "due", w.Workspace.UID, func(_ store.Workspace, s *store.Status) {
		s.Failure = &store.Failure{
			Generation: 1, Reason: "RUNTIME_UNAVAILABLE", Message: "test", Attempt: 3,
			Time: ahead, NextAttempt: ahead.Add(time.Minute),
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}

	s := in.serve("--import-images=" + ctrdtest.SaveImage(t, testImage, ctrdtest.TestImage(t)))
	client := workspacev1.NewWorkspaceControlClient(s.conn)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	wait := func() *workspacev1.Workspace {
		t.Helper()
		resp, err := client.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/due"})
		if err != nil {
			t.Fatalf("%v\n%s", err, s.log)
		}
		return resp.GetWorkspace()
	}
	wait()
	_, err = client.SetSecret(ctx, &workspacev1.SetSecretRequest{
		Name: "workspaces/due/secrets/K", Payload: &workspacev1.SetSecretRequest_Text{Text: "now"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := environ(t, wait().GetPid())["K"]; got != "now" {
		t.Errorf("after a change K is %q", got)
	}
	if err := s.stop(); err != nil {
		t.Error(err)
	}
}
