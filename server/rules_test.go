package server

import (
	"testing"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/reflect/protoreflect"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// Every pattern in the .proto has words, and every word a pattern.
func TestPatternsHaveWords(t *testing.T) {
	used := make(map[string]bool)
	note := func(field protoreflect.FieldDescriptor, rules *validate.StringRules) {
		if rules == nil || rules.Pattern == nil {
			return
		}
		used[rules.GetPattern()] = true
		if patternWords[rules.GetPattern()] == "" {
			t.Errorf("no words for the pattern of %s: %s", field.FullName(), rules.GetPattern())
		}
	}
	for _, file := range []protoreflect.FileDescriptor{
		workspacev1.File_workspace_v1_workspace_proto, workspacev1.File_workspace_v1_workspace_control_proto,
		workspacev1.File_workspace_v1_admin_control_proto, workspacev1.File_workspace_v1_access_proto,
	} {
		messages := file.Messages()
		for i := range messages.Len() {
			fields := messages.Get(i).Fields()
			for j := range fields.Len() {
				field := fields.Get(j)
				rules, err := protovalidate.ResolveFieldRules(field)
				if err != nil {
					t.Fatal(err)
				}
				note(field, rules.GetString())
				note(field, rules.GetRepeated().GetItems().GetString())
				note(field, rules.GetMap().GetKeys().GetString())
				note(field, rules.GetMap().GetValues().GetString())
			}
		}
	}
	for pattern := range patternWords {
		if !used[pattern] {
			t.Errorf("words for %s, which is in no .proto", pattern)
		}
	}
}
