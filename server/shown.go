package server

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// What callers get to see of workspaces.

// show is a workspace as the caller gets to see it. Its container sees how it does,
// and not what others have said of it: the spec has paths of the machine, and
// labels and etag are the operators'.
func (s *Server) show(ctx context.Context, w *store.Workspace) *workspacev1.Workspace {
	p := workspaceToProto(w)
	p.LastHeartbeatTime = timeToProto(s.containers.lastBeat(w))
	if !seesAll(ctx, w) {
		p.Spec, p.Labels, p.Etag, p.ContainerId, p.Pid = nil, nil, "", "", 0
	}
	return p
}

func seesAll(ctx context.Context, w *store.Workspace) bool {
	subject := &access.IdentityOf(ctx).Subject
	return subject.May(access.AnyOf(workspacev1.Role_ROLE_VIEWER), access.TargetOf(w))
}

// encode is show, encoded. What all who see everything get is made once, as long as
// the store shares w; what its container has told is not in the record.
func (s *Server) encode(ctx context.Context, w *store.Shared) ([]byte, error) {
	if seesAll(ctx, &w.Workspace) && s.containers.lastBeat(&w.Workspace).IsZero() {
		return w.Encoding(func(w *store.Workspace) ([]byte, error) { return encodeWorkspace(workspaceToProto(w)) })
	}
	return encodeWorkspace(s.show(ctx, &w.Workspace))
}

func encodeWorkspace(w *workspacev1.Workspace) ([]byte, error) {
	b, err := proto.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("marshal a workspace: %w", err)
	}
	return b, nil
}

// The numbers of the fields with workspaces in the responses.
const (
	workspaceField  = 1 // GetWorkspaceResponse.workspace
	workspacesField = 1 // ListWorkspacesResponse.workspaces
)

// setEncoded gives a response a field of messages that are encoded already. It has
// it as one that it does not know, which is sent as it is: its getter does not find
// it.
func setEncoded(resp proto.Message, field protowire.Number, messages ...[]byte) {
	size := 0
	for _, m := range messages {
		size += protowire.SizeTag(field) + protowire.SizeBytes(len(m))
	}
	b := make([]byte, 0, size)
	for _, m := range messages {
		b = protowire.AppendTag(b, field, protowire.BytesType)
		b = protowire.AppendBytes(b, m)
	}
	resp.ProtoReflect().SetUnknown(b)
}
