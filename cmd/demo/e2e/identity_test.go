package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// callInside has the workspace's program make a call, with its own token or another
// one, and returns the answer's code and message.
func (s *stage) callInside(id, method, token string, req, resp proto.Message) (codes.Code, string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 20*time.Second)
	defer cancel()
	message, err := proto.Marshal(req)
	if err != nil {
		s.t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.Socket(id))
	}}}
	post, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://workspace/call"+method, bytes.NewReader(message))
	if err != nil {
		s.t.Fatal(err)
	}
	post.Header.Set("Token", token)
	answer, err := client.Do(post)
	if err != nil {
		s.t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		s.t.Fatalf("%s from inside %s: %s %v: %s", method, id, answer.Status, err, body)
	}
	code, err := strconv.Atoi(answer.Header.Get("Grpc-Status"))
	if err != nil {
		s.t.Fatal(err)
	}
	if code == 0 {
		if err := proto.Unmarshal(body, resp); err != nil {
			s.t.Fatal(err)
		}
	}
	return codes.Code(code), answer.Header.Get("Grpc-Message")
}

// A program in a container, as a user that is not root, calls the daemon by the
// socket that it has mounted: about itself, also when the daemon has started anew,
// and about nothing else; and a restart of its container ends its token.
func TestWorkspaceIdentity(t *testing.T) {
	s := newStage(t, 3*time.Minute)
	if err := os.Chmod(s.VolumeDir, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"env", "file"} {
		spec := s.spec(id)
		spec.WorkspaceApi, spec.User, spec.ReadOnlyRoot = true, "1000:1000", true
		if id == "file" {
			spec.SecretDelivery = workspacev1.SecretDelivery_SECRET_DELIVERY_FILES
		}
		_, err := s.client().CreateWorkspace(s.ctx, &workspacev1.CreateWorkspaceRequest{
			WorkspaceId: id, Workspace: &workspacev1.Workspace{Spec: spec},
			Secrets: []*workspacev1.SecretValue{{Key: "KEY", Payload: &workspacev1.SecretValue_Text{Text: "of " + id}}},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	check := func(id, token string, want codes.Code) {
		t.Helper()
		get := &workspacev1.GetWorkspaceResponse{}
		if code, _ := s.callInside(id, workspacev1.WorkspaceControl_GetWorkspace_FullMethodName, token, &workspacev1.GetWorkspaceRequest{Name: "workspaces/" + id}, get); code != want {
			t.Errorf("%s: GetWorkspace: %v, want %v", id, code, want)
		}
		beat := &workspacev1.HeartbeatResponse{}
		if code, _ := s.callInside(id, workspacev1.WorkspaceControl_Heartbeat_FullMethodName, token, &workspacev1.HeartbeatRequest{Name: "workspaces/" + id}, beat); code != want {
			t.Errorf("%s: Heartbeat: %v, want %v", id, code, want)
		}
		fetch := &workspacev1.FetchSecretsResponse{}
		if code, _ := s.callInside(id, workspacev1.WorkspaceControl_FetchSecrets_FullMethodName, token, &workspacev1.FetchSecretsRequest{Name: "workspaces/" + id}, fetch); code != want {
			t.Errorf("%s: FetchSecrets: %v, want %v", id, code, want)
		}
		if want != codes.OK {
			return
		}
		if get.GetWorkspace().GetName() != "workspaces/"+id || beat.GetObservedGeneration() == 0 || s.get(id).GetLastHeartbeatTime() == nil {
			t.Errorf("%s: got %v, %v", id, get, beat)
		}
		if len(fetch.GetSecrets()) != 1 || string(fetch.GetSecrets()[0].GetValue()) != "of "+id {
			t.Errorf("%s: got %v", id, fetch)
		}
	}
	tokens := map[string]string{}
	for id, other := range map[string]string{"env": "file", "file": "env"} {
		s.wait(id, 1)
		env := s.inside(id, 1)
		if tokens[id] = env["WORKSPACE_TOKEN"]; (tokens[id] == "") != (id == "file") {
			t.Errorf("%s: WORKSPACE_TOKEN=%.4s...", id, tokens[id])
		}
		check(id, "", codes.OK)
		for what, call := range map[string]struct {
			method string
			req    proto.Message
		}{
			"another's secrets": {workspacev1.WorkspaceControl_FetchSecrets_FullMethodName, &workspacev1.FetchSecretsRequest{Name: "workspaces/" + other}},
			"another":           {workspacev1.WorkspaceControl_GetWorkspace_FullMethodName, &workspacev1.GetWorkspaceRequest{Name: "workspaces/" + other}},
			"a change":          {workspacev1.WorkspaceControl_SetSecret_FullMethodName, setSecret(id, "KEY", "mine")},
		} {
			if code, _ := s.callInside(id, call.method, "", call.req, nil); code != codes.PermissionDenied {
				t.Errorf("%s of %s: %v", what, id, code)
			}
		}
		check(id, "wsi_"+id+"_no-token", codes.Unauthenticated)
	}

	// The next daemon makes a new socket, which the containers find.
	s.stop()
	s.start()
	for id := range tokens {
		if got := s.inside(id, 1); got["WORKSPACE_TOKEN"] != tokens[id] {
			t.Errorf("%s was restarted", id)
		}
		check(id, "", codes.OK)
	}

	gen := s.set("env", "KEY", "of env, changed")
	s.wait("env", gen)
	env := s.inside("env", gen)
	if env["WORKSPACE_TOKEN"] == tokens["env"] {
		t.Error("the next container has the token of the one before")
	}
	check("env", tokens["env"], codes.Unauthenticated)
	if code, _ := s.callInside("env", workspacev1.WorkspaceControl_GetWorkspace_FullMethodName, "", &workspacev1.GetWorkspaceRequest{Name: "workspaces/env"}, &workspacev1.GetWorkspaceResponse{}); code != codes.OK {
		t.Errorf("the next container's token: %v", code)
	}
	// Beside the restart: nothing of it is left in what is on disk.
	if s := fmt.Sprint(s.get("env")); bytes.Contains([]byte(s), []byte(env["WORKSPACE_TOKEN"])) {
		t.Error("the token is in the record")
	}
}
